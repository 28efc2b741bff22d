# make build | test | test-full | handlers | test-vm | test-vm-all | fuzz | demo | bench | fmt | lint | docs | clean
# Everything that runs containers needs root. PROFILE=release for an optimised build.

PROFILE ?= dev
MUSL    := x86_64-unknown-linux-musl
TARGET  := $(or $(CARGO_TARGET_DIR),target)
BUILT   := $(TARGET)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
# What is run and tested: berth, berth-bridge, and the static monitor beside them.
BIN     := $(TARGET)/bin/$(PROFILE)
# Packages that supply the programs the build and the tests use.
PACKAGES := gcc libc6-dev iproute2 nftables conntrack iptables containernetworking-plugins busybox-static docker-registry e2fsprogs runc crun

export BERTH_BIN_DIR = $(abspath $(BIN))
# Stands in every panic's way of being read; set it when one is not understood.
export RUST_BACKTRACE ?= 0

.PHONY: handlers test-full all setup build fmt lint docs test unit e2e host test-vm test-vm-selinux test-vm-all fuzz demo bench bench-built clean
all: build

setup:
	@tests/setup $(PACKAGES)
	@rustup target list --installed | grep -qx $(MUSL) || rustup target add $(MUSL)

build: setup
	cargo build --locked --profile $(PROFILE) --bins
	cargo build --locked --profile monitor --target $(MUSL) -p berth-monitor
	@mkdir -p $(BIN)
	@for file in $(BUILT)/berth $(BUILT)/berth-bridge $(TARGET)/$(MUSL)/monitor/berth-monitor; do \
		install -m 755 $$file $(BIN)/; done

fmt:
	cargo fmt --all

lint: setup
	cargo fmt --all -- --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	tests/check-dependencies

docs:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --locked --workspace --no-deps --document-private-items

# Everything that does not start a daemon.
unit: build
	cargo test --locked --workspace --exclude berth-tests
	cargo test --locked -p berth-tests --lib

# The suites against a running Berth, on this machine's kernel. The whole workspace is
# named so that every command here builds dependencies with the same features, once.
e2e: build
	cargo test --locked --workspace --test e2e

# Both.
host: build
	cargo test --locked --workspace --no-fail-fast

# What the tests above do with small sizes, at the sizes that Berth is held to: 2 GiB of logs, 100 MiB
# of input, 1 GiB forwarded each way, 200 execs at once, a layer of 2 GiB, one of 300,000 files.
FULL := BERTH_TEST_LOG_MIB=2048 BERTH_TEST_STREAM_BYTES=104857600 BERTH_TEST_STREAM_EXECS=200 \
	BERTH_TEST_FORWARD_BYTES=1073741824 BERTH_LARGE_LAYER_MIB=2048 BERTH_MANY_FILES=300000
test-full: build
	$(FULL) cargo test --locked --workspace --test e2e -- log_torture streaming image_sizes

# The suites of containers over runc and crun as runtime handlers.
handlers: build
	tests/handlers

# The same suites on Debian's kernel with cgroup v2 and systemd: a core set, or all.
test-vm: build
	tests/vm/suites core

# SELinux, enforcing, with a small policy of the tests' own; some minutes.
test-vm-selinux: build
	tests/vm/suites selinux

# What depends on cgroups and systemd, with both cgroup drivers, and over runc and crun with
# systemd's; four runs, each ended after half an hour.
test-vm-drivers: build
	tests/vm/suites drivers
	tests/handlers --vm

test-vm-all: build
	tests/vm/suites all

test: lint
	tests/run-all

# libFuzzer on every target of fuzz/, FUZZ_SECONDS each, two at a time on two cores.
FUZZ_SECONDS ?= 60
fuzz:
	@tests/setup gcc g++ libc6-dev
	fuzz/run $(FUZZ_SECONDS) $(TARGETS)

demo: build
	@$(BUILT)/demo

# Pod starts next to Debian's containerd and runc; BENCH="exec -n 200" for execs. BENCH=network
# is a pod's network next to Debian's plugins, BENCH=throughput what it lets through.
APART := network throughput
bench:
	@tests/setup containerd runc containernetworking-plugins iperf3
	@$(MAKE) --no-print-directory PROFILE=release bench-built

bench-built: build
	@$(BUILT)/$(if $(filter $(APART),$(BENCH)),berth-bench,against-containerd) $(BENCH)

clean:
	cargo clean
