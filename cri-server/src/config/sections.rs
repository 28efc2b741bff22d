//! Every key there is, with its unit, its default and its documentation: the
//! one source of the structs, the defaults, the parser and the printed file.

use super::setting::{
    CgroupDriver, DefaultNetwork, Fallback, FileMode, ImageVolumes, LogFormat, LogLevel,
    LogsOnFull, PrimaryFamily, SelinuxChoice, Setting, TlsVersion, UnsetSeccomp,
};
use std::collections::BTreeMap;
use std::path::PathBuf;
use toml::de::DeValue;

/// One key, for printing.
pub struct Key {
    pub name: &'static str,
    /// Its documentation, a line each.
    pub docs: &'static [&'static str],
    /// The current value in TOML.
    pub value: String,
}

/// Why a key could not be set.
pub enum Refusal {
    /// There is no such key.
    Unknown,
    /// The value is not what the key wants, which is this.
    WrongType(String),
}

/// One `[section]` of the file.
pub trait Section {
    /// Its documentation, a line each.
    fn docs(&self) -> &'static [&'static str];
    /// The names of its keys.
    fn names(&self) -> &'static [&'static str];
    /// Its keys with their current values.
    fn keys(&self) -> Vec<Key>;
    /// Sets one key.
    fn set(&mut self, name: &str, value: &DeValue<'_>) -> Result<(), Refusal>;
}

macro_rules! section {
    (
        $(#[doc = $doc:literal])*
        $section:ident {
            $( $(#[doc = $kdoc:literal])* $key:ident: $type:ty = $default:expr; )*
        }
    ) => {
            $(#[doc = $doc])*
            #[derive(Clone, Debug, PartialEq)]
            pub struct $section {
                $( $(#[doc = $kdoc])* pub $key: $type, )*
            }

            impl Default for $section {
                fn default() -> Self {
                    Self { $( $key: $default, )* }
                }
            }

            impl Section for $section {
                fn docs(&self) -> &'static [&'static str] {
                    &[$($doc),*]
                }
                fn names(&self) -> &'static [&'static str] {
                    &[$(stringify!($key)),*]
                }
                fn keys(&self) -> Vec<Key> {
                    vec![$(Key {
                        name: stringify!($key),
                        docs: &[$($kdoc),*],
                        value: self.$key.write(),
                    }),*]
                }
                fn set(&mut self, name: &str, value: &DeValue<'_>) -> Result<(), Refusal> {
                    match name {
                        $(stringify!($key) => {
                            self.$key = <$type as Setting>::read(value)
                                .ok_or_else(|| Refusal::WrongType(<$type as Setting>::wanted()))?;
                            Ok(())
                        })*
                        _ => Err(Refusal::Unknown),
                    }
                }
            }
    };
}

macro_rules! sections {
    ($(
        $(#[doc = $doc:literal])*
        $field:ident: $section:ident { $($body:tt)* }
    )*) => {
        $(
            section! {
                $(#[doc = $doc])*
                $section { $($body)* }
            }
        )*

        /// The whole configuration. `Default` is what a node without a file has.
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct Config {
            $( $(#[doc = $doc])* pub $field: $section, )*
            /// Runtime handlers by name, beside the built-in one.
            pub handlers: BTreeMap<String, Handler>,
        }

        impl Config {
            /// The names of all sections, in the order they are printed.
            pub const SECTIONS: &'static [&'static str] = &[$(stringify!($field)),*];

            /// A section by name.
            pub fn section(&self, name: &str) -> Option<&dyn Section> {
                match name {
                    $(stringify!($field) => Some(&self.$field),)*
                    _ => None,
                }
            }

            /// A section by name, to be changed.
            pub fn section_mut(&mut self, name: &str) -> Option<&mut dyn Section> {
                match name {
                    $(stringify!($field) => Some(&mut self.$field),)*
                    _ => None,
                }
            }
        }
    };
}

section! {
    /// A further runtime handler: an OCI runtime with a command line. A section of its own for
    /// each: [handlers.NAME]. runc and crun are handlers without one where they are in PATH.
    Handler {
        /// The program, an absolute path. "": the handler's name, looked up in PATH.
        path: PathBuf = PathBuf::new();
        /// Where the runtime keeps what it knows of containers.
        /// "": handlers/NAME in the run directory.
        root: PathBuf = PathBuf::new();
        /// Options that come before its commands.
        options: Vec<String> = Vec::new();
        /// With the cgroup driver systemd, whether the runtime makes a container's scope, told by
        /// its option --systemd-cgroup, as runc, crun and runsc have it. false, for a runtime
        /// without: Berth makes the scope, and the runtime is given the cgroup's path.
        systemd_cgroup: bool = true;
        /// Whether privileged containers go without the host's devices.
        privileged_without_host_devices: bool = false;
        /// Annotations of pods and containers that the runtime is told of: keys, or beginnings of
        /// keys that end in "*".
        annotations: Vec<String> = Vec::new();
        /// An OCI spec, a JSON file, whose fields count where Berth says nothing. "": none.
        base_spec: PathBuf = PathBuf::new();
    }
}

sections! {
    /// Where things are kept. Empty paths follow `--root`.
    paths: Paths {
        /// Images and the records of pods and containers; must survive a reboot.
        /// Keep it outside directories that only root may enter.
        /// "": /var/lib/berth, or DIR/lib with --root DIR.
        state: PathBuf = PathBuf::new();
        /// What lives until the reboot: sockets, pinned namespaces, /dev/shm of pods.
        /// "": /run/berth, or DIR/run with --root DIR.
        run: PathBuf = PathBuf::new();
        /// Images, where they are to be on another file system than the records.
        /// "": images in the state directory.
        images: PathBuf = PathBuf::new();
        /// Containers' writable layers, where they are to be on another file system; the image
        /// and container file systems of the kubelet may differ.
        /// "": containers in the state directory.
        containers: PathBuf = PathBuf::new();
    }

    /// The socket that the kubelet and crictl talk to.
    grpc: Grpc {
        /// Path of the unix socket. --socket overrides it.
        /// "": berth.sock in the run directory (/run/berth/berth.sock).
        socket: PathBuf = PathBuf::new();
        /// Permissions of the socket, octal. Who may open it is root on this node.
        socket_mode: FileMode = FileMode(0o660);
    }

    /// The server behind exec, attach and port-forward. Who may call it is whom CRI gave a URL.
    streaming: Streaming {
        /// Address and port to listen on; port 0 is any that is free. The kubelet connects to it,
        /// so there is no reason to leave this node.
        address: String = "127.0.0.1:0".to_owned();
        /// PEM file with the server's certificate and those it needs. Read again when it changes.
        /// "": plain HTTP.
        tls_certificate: PathBuf = PathBuf::new();
        /// PEM file with its key.
        tls_key: PathBuf = PathBuf::new();
        /// PEM file with the authorities whose certificates clients must show. "": none is asked for.
        tls_client_ca: PathBuf = PathBuf::new();
        /// The oldest version of TLS that is spoken, "1.2" or "1.3".
        tls_min_version: TlsVersion = TlsVersion::Tls12;
        /// How long a URL is good for, once. Unit: seconds, at least 1.
        token_lifetime_seconds: u32 = 60;
        /// How long a connection may be without a byte in either direction before it is closed.
        /// Unit: seconds, at least 1.
        idle_timeout_seconds: u32 = 14_400;
    }

    /// Metrics for Prometheus, plain HTTP, path /metrics.
    metrics: Metrics {
        /// Address and port to listen on, "127.0.0.1:9475" for example. Nothing else is bound.
        /// "": off.
        address: String = String::new();
    }

    /// Pulling and keeping images.
    images: Images {
        /// Directories with HOST/hosts.toml files (mirrors, plain HTTP, CAs), the first that
        /// knows a host wins. Read at every pull.
        /// []: certs.d beside the main configuration file's directory: /etc/berth/certs.d, or
        /// DIR/etc/certs.d with --root DIR.
        certs_d: Vec<PathBuf> = Vec::new();
        /// Where names are served, mirrors, what is blocked, short names: registries.conf, version
        /// 2 of the format, with registries.conf.d beside it. Read at every pull; need not be there.
        /// "": registries.conf beside the main configuration file.
        registries_conf: PathBuf = PathBuf::new();
        /// Credentials of the node's own, in the format of Docker's config.json, for pulls that
        /// bring none and for mirrors. Read at every pull; need not be there.
        /// "": auth.json beside the main configuration file.
        auth_file: PathBuf = PathBuf::new();
        /// Which images are accepted, in the format of containers-policy.json. Read at every pull
        /// and every use of an image. "": policy.json beside the main configuration file; without
        /// that file everything is accepted.
        policy: PathBuf = PathBuf::new();
        /// Whether a registry that has mirrors is asked itself when they fail: "origin" or "never".
        /// A hosts.toml with "fallback" decides for its registry.
        fallback: Fallback = Fallback::Origin;
        /// Images that are never offered to the kubelet's collection: names, * for anything.
        pinned: Vec<String> = Vec::new();
        /// Pulls at the same time; the others wait. Unit: pulls, at least 1.
        max_parallel_pulls: u32 = 16;
        /// Layers of one image fetched at the same time. Unit: layers, at least 1.
        max_parallel_downloads: u32 = 3;
        /// Layers fetched at the same time by all pulls together; each pull may fetch one beyond
        /// them, so that a slow registry holds up nobody else. Unit: layers, at least 1.
        max_parallel_layers: u32 = 8;
        /// A download that brings less than this, measured over 30 seconds of waiting for the
        /// network, is given up or goes on at the next host. Unit: bytes per second. 0: never.
        min_bytes_per_second: u64 = 1024;
        /// How long after one scrub of all stored layers the next begins, and one begins after each
        /// boot: each file is compared with what was unpacked. Unit: hours. 0: never.
        scrub_every_hours: u32 = 168;
        /// How fast a scrub reads at most. Unit: MiB per second, at least 1.
        scrub_mib_per_second: u32 = 16;
        /// The cgroup that layers are written in by pulls and imports, each by a process of its
        /// own, so that they do not take the disk from what runs here: a path as in cgroup.parent
        /// and apart from it, "/berth-pulls" for example, made where it is not there; with systemd
        /// the slice of that name. "": none, the daemon writes them.
        pull_cgroup: String = String::new();
        /// The weight of that cgroup's I/O; others have 100 unless they were given another. It acts
        /// where disks have the BFQ scheduler, or io.cost on cgroup v2; `berth doctor` says what is
        /// missing. Unit: that of cgroup v2's io.weight, 1 to 10000. 0: as the kernel has it.
        pull_io_weight: u32 = 0;
    }

    /// The network of pods that do not use the host's.
    network: Network {
        /// What happens without a CNI configuration: "builtin" uses Berth's own bridge, "wait"
        /// keeps the node NetworkReady=false until a conflist appears.
        default: DefaultNetwork = DefaultNetwork::Builtin;
        /// Name of the built-in network's bridge, at most 15 characters.
        bridge: String = "berth0".to_owned();
        /// Subnets the built-in network gives addresses from, at most one for IPv4 and one for IPv6.
        subnets: Vec<String> = vec![berth_netplugin::bridge::DEFAULT_IPV4.to_owned()];
        /// Largest packet on the built-in network. Unit: bytes. 0: that of the default route's link.
        mtu: u32 = 0;
        /// Whether packets that leave the subnet get the host's address.
        masquerade: bool = true;
        /// Networks outside the subnet that pods send to with their own address all the same: those
        /// of other nodes' pods, where routes lead to them.
        no_masquerade: Vec<String> = Vec::new();
        /// Whether a pod reaches itself through its own host port.
        hairpin: bool = true;
        /// Directory with CNI configurations; the first by name counts.
        /// "": /etc/cni/net.d, or DIR/etc/cni/net.d with --root DIR.
        cni_conf_dir: PathBuf = PathBuf::new();
        /// Directories with CNI plugins, searched in this order.
        cni_bin_dirs: Vec<PathBuf> = vec![PathBuf::from("/opt/cni/bin"), PathBuf::from("/usr/lib/cni")];
        /// Name of the CNI network that counts, as its configuration has it.
        /// "": that of the first file by name.
        cni_network: String = String::new();
        /// Template of a CNI configuration, in containerd's conf_template format. Once the kubelet
        /// names the node's pod network it becomes 10-berth.conflist, where the directory has no
        /// other configuration. "": none.
        cni_template: PathBuf = PathBuf::new();
        /// CNI configurations of their own for pods of certain runtime handlers, "HANDLER=DIR" each.
        cni_handler_dirs: Vec<String> = Vec::new();
        /// How long one CNI plugin may take for a pod. Unit: seconds, at least 1.
        cni_timeout_seconds: u32 = 100;
        /// How often networks of pods that are gone are looked for, by Berth's records and by CNI's
        /// GC. Unit: seconds, at least 1.
        gc_seconds: u32 = 3600;
        /// Which of a pod's addresses is the first: "ipv4", "ipv6" or "as-given" by the network.
        primary_family: PrimaryFamily = PrimaryFamily::Ipv4;
    }

    /// Control groups.
    cgroup: Cgroup {
        /// "auto", "cgroupfs" or "systemd". auto: systemd where that is process 1 and cgroup v2 is
        /// mounted, else cgroupfs. The kubelet learns it from RuntimeConfig.
        driver: CgroupDriver = CgroupDriver::Auto;
        /// Parent of pods whose request names none. With systemd "/berth" stands for berth.slice.
        parent: String = "/berth".to_owned();
        /// Whether a memory limit below what a container uses is refused, as the kernel of cgroup
        /// v1 does by itself; that of v2 would kill it.
        memory_guard: bool = true;
        /// Processes and threads a container may have that is given no limit; the kubelet limits
        /// whole pods (podPidsLimit). 0: as many as it likes.
        pids_limit: u32 = 0;
    }

    /// The process that watches over one pod.
    monitor: Monitor {
        /// The berth-monitor program. "": beside the berth program, else in PATH.
        path: PathBuf = PathBuf::new();
    }

    /// What containers get unless they ask for something else.
    runtime: Runtime {
        /// Soft limit of open files. Unit: descriptors.
        nofile_soft: u64 = 1024;
        /// Hard limit of open files; clamped to what the daemon may give. Unit: descriptors.
        nofile_hard: u64 = 524_288;
        /// A container whose request names no seccomp profile at all: "unconfined", as CRI says, or
        /// "runtime/default". The kubelet always names one.
        unset_seccomp: UnsetSeccomp = UnsetSeccomp::Unconfined;
        /// SELinux labels for containers: "auto", where SELinux is on and its policy has an
        /// lxc_contexts file, "on", where the daemon is not to start without, or "off", which
        /// leaves requests for labels and relabelling unheard. What containerd calls
        /// enable_selinux and CRI-O selinux.
        selinux: SelinuxChoice = SelinuxChoice::Auto;
        /// How many categories there are for pods, two for each: c0 up to the one before this
        /// number. 2 to 1024.
        selinux_categories: u32 = berth_sandbox::selinux::CATEGORIES;
        /// Directories with CDI files of device vendors; later ones win. Read whenever a container
        /// asks for devices.
        cdi_spec_dirs: Vec<PathBuf> = berth_sandbox::cdi::DEFAULT_DIRS.iter().map(PathBuf::from).collect();
        /// Longest piece of output in one line of a container's log; longer lines are split and
        /// marked P. Unit: bytes, 256 to 1048576.
        log_line_bytes: u32 = 16_384;
    }

    /// Containers' logs. Applies to containers started after a change.
    logs: Logs {
        /// What happens when a log cannot be written, because its disk is full or slow or a budget
        /// below is used up: "block" makes the container wait once its pipe is full and loses no
        /// line, "drop" drops lines, counts them, and says so in the log.
        on_full: LogsOnFull = LogsOnFull::Block;
        /// Output of one container on average. Unit: bytes a second. 0: no bound.
        bytes_per_second: u64 = 0;
        /// Size of a container's log file until the kubelet rotates it. Unit: bytes. 0: no bound.
        file_bytes: u64 = 0;
    }

    /// What every container gets that asks for nothing else.
    containers: Containers {
        /// Variables, NAME=value each. The image's and the container's own win.
        env: Vec<String> = Vec::new();
        /// Capabilities, by name without CAP_. A container may add to them and drop them.
        capabilities: Vec<String> = super::containers::usual_capabilities();
        /// File mode creation mask of the first process and of commands, octal.
        umask: FileMode = FileMode(0o022);
        /// Further resource limits, NAME=SOFT:HARD each: "nproc=1024:4096", "core=0:0", with
        /// "unlimited" for none; clamped to what the daemon may give. For nofile see runtime.
        rlimits: Vec<String> = Vec::new();
        /// Sysctls, NAME=value each, of the network and IPC namespaces that a pod has of its own:
        /// "net.ipv4.ip_unprivileged_port_start=0". The pod's own win.
        sysctls: Vec<String> = Vec::new();
        /// The time zone: "" for the image's own, "local" for the host's, or a name in
        /// /usr/share/zoneinfo. Its file is mounted at /etc/localtime.
        timezone: String = String::new();
        /// What becomes of the paths that an image calls volumes and the pod mounts nothing at:
        /// "directory" makes them in the container's own layer, with what the image has there, and
        /// keeps them writable when the root is read-only; "ignore" leaves them as they are.
        image_volumes: ImageVolumes = ImageVolumes::Directory;
        /// Whether containers without privileges may write to their own cgroup. Berth does not
        /// start with it but on cgroup v2 mounted with nsdelegate, which systemd does: elsewhere
        /// containers could raise their own limits.
        writable_cgroup: bool = false;
        /// Whether a container's devices belong to the user and group it runs as; else they have
        /// the owners they have on the host.
        devices_of_user: bool = false;
    }

    /// The daemon's own log, on standard error.
    log: Log {
        /// "error", "warn", "info", "debug" or "trace". Read again at SIGHUP.
        level: LogLevel = LogLevel::Info;
        /// "text" or "json" (one object a line).
        format: LogFormat = LogFormat::Text;
    }
}
