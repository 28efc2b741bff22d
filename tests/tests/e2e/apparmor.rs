//! AppArmor: on a node that has it, profiles confine; on one without, a named
//! profile is refused and the default one means nothing.

use berth_proto::runtime_v1::{self as cri, security_profile::ProfileType};
use berth_tests::{LinuxConfig, Node, Pod};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use tonic::Code;

fn has_apparmor() -> bool {
    std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
        .is_ok_and(|text| text.trim() == "Y")
}

fn with_profile(
    pod: &Pod<'_>,
    kind: ProfileType,
    name: &str,
    command: &[&str],
) -> cri::ContainerConfig {
    let mut config = pod.container(command);
    config.security().apparmor = Some(cri::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: name.to_owned(),
    });
    config
}

/// What the kernel says that confines it, from the host.
fn confinement(container: &berth_tests::Container<'_>) -> String {
    let path = format!("/proc/{}/attr/apparmor/current", container.init_pid());
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

/// Loads a profile; it stays until the machine goes.
fn load(text: &str) {
    let mut parser = Command::new("apparmor_parser")
        .args(["--replace", "--skip-cache"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("apparmor_parser");
    parser
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    assert!(parser.wait().unwrap().success());
}

#[test]
fn a_profile_confines_where_the_node_has_apparmor() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let sleep = &["sleep", "1000"];
    if !has_apparmor() {
        let asked = with_profile(&pod, ProfileType::Localhost, "berth-test", sleep);
        let error = pod
            .try_create(asked)
            .err()
            .expect("nothing would enforce it");
        assert_eq!(error.code(), Code::Unimplemented, "{error}");
        pod.start_as(with_profile(&pod, ProfileType::RuntimeDefault, "", sleep));
        pod.start_as(with_profile(&pod, ProfileType::Unconfined, "", sleep));
        return;
    }
    let missing = with_profile(&pod, ProfileType::Localhost, "berth-not-loaded", sleep);
    let error = pod.try_create(missing).err().expect("it is not loaded");
    assert!(error.message().contains("berth-not-loaded"), "{error}");

    let usual = pod.start(sleep);
    assert_eq!(confinement(&usual), "berth-default (enforce)");
    // An exec is confined, too, and ordinary work goes on.
    assert_eq!(
        usual
            .exec(&["cat", "/proc/self/attr/apparmor/current"])
            .trim(),
        "berth-default (enforce)"
    );
    usual.exec(&[
        "sh",
        "-c",
        "echo x > /tmp/x; ls / > /dev/null; sleep 0 & wait",
    ]);
    usual.stop(5).unwrap();

    let free = pod.start_as(with_profile(&pod, ProfileType::Unconfined, "", sleep));
    assert_eq!(confinement(&free), "unconfined");

    load(
        "profile berth-test flags=(attach_disconnected) { file, network, capability, signal, deny /tmp/** w, }",
    );
    let write = &["touch", "/tmp/file"];
    let denied = pod.start_as(with_profile(
        &pod,
        ProfileType::Localhost,
        "berth-test",
        write,
    ));
    assert_ne!(denied.wait_for_exit().exit_code, 0);
    let same = pod.start_as(with_profile(
        &pod,
        ProfileType::Localhost,
        "berth-test",
        sleep,
    ));
    assert_eq!(confinement(&same), "berth-test (enforce)");
}

#[test]
fn our_default_profile_keeps_a_container_from_mounting_even_with_the_capability() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sh", "-c", "mkdir /m; mount -t tmpfs none /m"]);
    let caps = config.security().capabilities.get_or_insert_default();
    caps.add_capabilities = vec!["SYS_ADMIN".to_owned()];
    let container = pod.start_as(config);
    let code = container.wait_for_exit().exit_code;
    assert_eq!(code != 0, has_apparmor(), "{}", container.stderr());
}

/// Each of them is written what it says already: nothing changes where it gets through.
/// The paths that could not be written.
const REWRITE: &str = r#"for f in "$@"; do
    v=$(cat $f 2>/dev/null) && [ -w $f ] || continue
    (printf %s "$v" > $f) 2>/dev/null || echo $f
done"#;

/// Of the whole host.
const HOSTS: [&str; 12] = [
    "kernel/sysrq",
    "kernel/panic",
    "kernel/pid_max",
    "kernel/core_pattern",
    "kernel/modprobe",
    "kernel/randomize_va_space",
    "kernel/threads-max",
    "kernel/sched_rt_runtime_us",
    "fs/suid_dumpable",
    "fs/protected_symlinks",
    "fs/file-max",
    "vm/overcommit_memory",
];

/// Of the pod's own namespaces.
const PODS: [&str; 7] = [
    "kernel/shmmax",
    "kernel/msgmax",
    "kernel/sem",
    "kernel/hostname",
    "kernel/domainname",
    "fs/mqueue/msg_max",
    "net/ipv4/ip_unprivileged_port_start",
];

fn sysctls(names: &[&str]) -> Vec<String> {
    let paths = names.iter().map(|name| format!("/proc/sys/{name}"));
    paths.filter(|path| Path::new(path).exists()).collect()
}

#[test]
fn our_default_profile_keeps_the_hosts_sysctls_from_who_has_them_unmasked() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let (hosts, pods) = (sysctls(&HOSTS), sysctls(&PODS));
    assert!(
        hosts.len() > 8 && pods.len() == PODS.len(),
        "{hosts:?} {pods:?}"
    );
    let mut command = vec!["sh", "-c", REWRITE, "sh"];
    command.extend(hosts.iter().chain(&pods).map(String::as_str));
    let mut config = pod.container(&command);
    // As the kubelet asks for procMount: Unmasked.
    config.security().masked_paths.clear();
    config.security().readonly_paths.clear();
    let refused = pod.output_as(config);
    let expected = match has_apparmor() {
        true => hosts.iter().map(|path| format!("{path}\n")).collect(),
        false => String::new(),
    };
    assert_eq!(refused, expected);
}

#[test]
fn our_default_profile_keeps_the_kernels_files_from_who_may_unmount() {
    let node = Node::start();
    let pod = node.run_pod("web");
    // Lifts what it can, and says what it then can do.
    let script = "for m in /proc/sys /proc/sysrq-trigger /proc/kcore /proc/keys /sys/firmware; do
            umount -l $m 2>/dev/null && echo $m lifted
        done
        for f in kernel/sysrq kernel/panic fs/suid_dumpable; do
            v=$(cat /proc/sys/$f) && (echo $v > /proc/sys/$f) 2>/dev/null && echo $f written
        done
        true";
    let mut config = pod.container(&["sh", "-c", script]);
    let caps = config.security().capabilities.get_or_insert_default();
    caps.add_capabilities = vec!["SYS_ADMIN".to_owned()];
    let done = pod.output_as(config);
    match has_apparmor() {
        true => assert_eq!(done, ""),
        // It is root of the host by that capability, and the test does what it says.
        false => assert!(done.contains("kernel/panic written"), "{done}"),
    }
}
