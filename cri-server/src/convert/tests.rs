//! Every refusal, one request each, and what a good request becomes.

use super::*;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::ContainerSpec;
use berth_sandbox::PodSpec;
use berth_sandbox::container_spec::{AppArmorProfile, Propagation};
use berth_sandbox::pod_spec::{Namespace, PidMode};

fn node() -> NodeFacts {
    NodeFacts {
        apparmor: false,
        handlers: Default::default(),
        unset_seccomp: SeccompProfile::Unconfined,
    }
}

fn pod_request() -> cri::RunPodSandboxRequest {
    cri::RunPodSandboxRequest {
        config: Some(cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "web".into(),
                uid: "a-uid".into(),
                namespace: "default".into(),
                attempt: 1,
            }),
            hostname: "web".into(),
            log_directory: "/var/log/pods/web".into(),
            ..Default::default()
        }),
        runtime_handler: String::new(),
    }
}

fn pod_with(change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Result<PodSpec, Refused> {
    let mut request = pod_request();
    change(request.config.as_mut().unwrap());
    pod_spec(&request, &node())
}

fn pod_context(
    change: impl FnOnce(&mut cri::LinuxSandboxSecurityContext),
) -> Result<PodSpec, Refused> {
    pod_with(|config| {
        let mut context = cri::LinuxSandboxSecurityContext::default();
        change(&mut context);
        config.linux.get_or_insert_default().security_context = Some(context);
    })
}

fn pod_options(option: cri::NamespaceOption) -> Result<PodSpec, Refused> {
    pod_context(|context| context.namespace_options = Some(option))
}

fn container_config() -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: "nginx".into(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: "registry.test/nginx:1".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container_in(
    pod: &PodSpec,
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<ContainerSpec, Refused> {
    let mut config = container_config();
    change(&mut config);
    container_spec(Some(&config), pod, &node())
}

fn container_with(
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<ContainerSpec, Refused> {
    container_in(&pod_spec(&pod_request(), &node()).unwrap(), change)
}

fn context_with(
    change: impl FnOnce(&mut cri::LinuxContainerSecurityContext),
) -> Result<ContainerSpec, Refused> {
    container_with(|config| {
        let mut context = cri::LinuxContainerSecurityContext::default();
        change(&mut context);
        config.linux.get_or_insert_default().security_context = Some(context);
    })
}

fn mount_with(change: impl FnOnce(&mut cri::Mount)) -> Result<ContainerSpec, Refused> {
    let mut mount = cri::Mount {
        container_path: "/data".into(),
        host_path: "/srv/data".into(),
        ..Default::default()
    };
    change(&mut mount);
    container_with(|config| config.mounts = vec![mount])
}

/// The request is refused as one that can never succeed, naming `field`.
#[track_caller]
fn invalid<T: std::fmt::Debug>(outcome: Result<T, Refused>, field: &str) {
    match outcome {
        Err(Refused::Invalid { field: named, .. }) => assert_eq!(named, field),
        other => panic!("{field}: {other:?}"),
    }
}

/// The request is refused as one Berth does not do yet, naming `field`.
#[track_caller]
fn unsupported<T: std::fmt::Debug>(outcome: Result<T, Refused>, field: &str) {
    match outcome {
        Err(Refused::Unsupported { field: named, .. }) => assert_eq!(named, field),
        other => panic!("{field}: {other:?}"),
    }
}

fn id(value: i64) -> Option<cri::Int64Value> {
    Some(cri::Int64Value { value })
}

fn profile(kind: cri::security_profile::ProfileType, name: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: name.into(),
    })
}

use cri::security_profile::ProfileType;

#[test]
fn a_plain_pod_is_accepted() {
    let spec = pod_spec(&pod_request(), &node()).unwrap();
    assert_eq!(spec.name.to_string(), "default/web");
    assert_eq!(spec.namespaces, Default::default());
    assert_eq!(spec.log_directory.to_str(), Some("/var/log/pods/web"));
}

#[test]
fn a_pod_needs_names() {
    let named = |change: fn(&mut cri::PodSandboxMetadata)| {
        pod_with(|config| change(config.metadata.as_mut().unwrap()))
    };
    invalid(
        pod_spec(&cri::RunPodSandboxRequest::default(), &node()),
        "config",
    );
    invalid(pod_with(|config| config.metadata = None), "config.metadata");
    invalid(named(|m| m.name.clear()), "config.metadata.name");
    invalid(named(|m| m.name = "a/../b".into()), "config.metadata.name");
    invalid(named(|m| m.namespace.clear()), "config.metadata.namespace");
    invalid(
        named(|m| m.namespace = "..".into()),
        "config.metadata.namespace",
    );
    invalid(named(|m| m.uid = "a\nb".into()), "config.metadata.uid");
    named(|m| m.uid.clear()).unwrap();
}

#[test]
fn an_unknown_handler_is_refused() {
    for (handler, good) in [
        ("", true),
        ("berth", true),
        ("kata", false),
        ("../runc", false),
    ] {
        let request = cri::RunPodSandboxRequest {
            runtime_handler: handler.into(),
            ..pod_request()
        };
        let outcome = pod_spec(&request, &node());
        if good {
            assert_eq!(outcome.unwrap().runtime_handler, handler);
        } else {
            invalid(outcome, "runtime_handler");
        }
    }
}

#[test]
fn bad_host_names_and_log_directories_are_refused() {
    invalid(pod_with(|c| c.hostname = "-web".into()), "config.hostname");
    invalid(pod_with(|c| c.hostname = "a".repeat(65)), "config.hostname");
    invalid(
        pod_with(|c| c.log_directory = "logs".into()),
        "config.log_directory",
    );
    invalid(
        pod_with(|c| c.log_directory = "/var/log/../../etc".into()),
        "config.log_directory",
    );
    pod_with(|c| c.log_directory.clear()).unwrap();
}

#[test]
fn windows_sections_are_refused() {
    invalid(
        pod_with(|c| c.windows = Some(Default::default())),
        "config.windows",
    );
    invalid(
        container_with(|c| c.windows = Some(Default::default())),
        "config.windows",
    );
}

#[test]
fn resolv_conf_cannot_be_injected_into() {
    let dns = |servers: &[&str], searches: &[&str], options: &[&str]| {
        let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        pod_with(|config| {
            config.dns_config = Some(cri::DnsConfig {
                servers: list(servers),
                searches: list(searches),
                options: list(options),
            });
        })
    };
    dns(
        &["10.0.0.10", "fd00::a", "fe80::1%eth0"],
        &["svc.cluster.local"],
        &["ndots:5"],
    )
    .unwrap();
    invalid(
        dns(&["dns.example"], &[], &[]),
        "config.dns_config.servers[0]",
    );
    invalid(
        dns(&["fe80::1%a b"], &[], &[]),
        "config.dns_config.servers[0]",
    );
    invalid(
        dns(&[], &["a", "b\nnameserver 6.6.6.6"], &[]),
        "config.dns_config.searches[1]",
    );
    invalid(dns(&[], &[], &[""]), "config.dns_config.options[0]");
}

#[test]
fn ports_are_checked() {
    let ports = |mappings: &[(i32, i32, &str, i32)]| {
        pod_with(|config| {
            config.port_mappings = mappings
                .iter()
                .map(
                    |(container_port, host_port, host_ip, protocol)| cri::PortMapping {
                        protocol: *protocol,
                        container_port: *container_port,
                        host_port: *host_port,
                        host_ip: (*host_ip).to_owned(),
                    },
                )
                .collect();
        })
    };
    let spec = ports(&[
        (80, 8080, "", 0),
        (53, 53, "127.0.0.1", 1),
        (9000, 0, "", 0),
    ])
    .unwrap();
    assert_eq!(
        spec.port_mappings.len(),
        2,
        "a mapping without a host port is dropped"
    );
    invalid(
        ports(&[(80, 65536, "", 0)]),
        "config.port_mappings[0].host_port",
    );
    invalid(
        ports(&[(80, -1, "", 0)]),
        "config.port_mappings[0].host_port",
    );
    invalid(
        ports(&[(0, 80, "", 0)]),
        "config.port_mappings[0].container_port",
    );
    invalid(
        ports(&[(70000, 80, "", 0)]),
        "config.port_mappings[0].container_port",
    );
    invalid(
        ports(&[(80, 80, "localhost", 0)]),
        "config.port_mappings[0].host_ip",
    );
    invalid(
        ports(&[(80, 80, "", 7)]),
        "config.port_mappings[0].protocol",
    );
    invalid(
        ports(&[(80, 80, "", 0), (81, 80, "", 0)]),
        "config.port_mappings[1]",
    );
    ports(&[(80, 80, "", 0), (80, 80, "", 1)]).unwrap();
}

#[test]
fn sysctls_of_the_node_and_path_tricks_are_refused() {
    let sysctl = |name: &str, value: &str| {
        pod_with(|config| {
            config.linux.get_or_insert_default().sysctls =
                [(name.to_owned(), value.to_owned())].into();
        })
    };
    for (name, dotted) in [
        (
            "net.ipv4.ip_unprivileged_port_start",
            "net.ipv4.ip_unprivileged_port_start",
        ),
        (
            "net/ipv4/conf/eth0.100/rp_filter",
            "net.ipv4.conf.eth0/100.rp_filter",
        ),
        ("kernel.shm_rmid_forced", "kernel.shm_rmid_forced"),
        ("kernel.sem", "kernel.sem"),
        ("fs.mqueue.msg_max", "fs.mqueue.msg_max"),
    ] {
        assert_eq!(
            sysctl(name, "1").unwrap().sysctls.keys().next().unwrap(),
            dotted
        );
    }
    for bad in [
        "",
        "net",
        "kernel.pid_max",
        "vm.swappiness",
        "net..x",
        "net.//.x",
        "net/../../etc",
        "net.a b",
        "net.a\0",
    ] {
        let field = Field::root("config");
        let field = field.at("linux");
        let field = field.at("sysctls");
        invalid(sysctl(bad, "1"), &field.key(bad).to_string());
    }
    invalid(sysctl("net.a", "1\n2"), "config.linux.sysctls[\"net.a\"]");
}

#[test]
fn a_sysctl_needs_the_namespace_it_lives_in() {
    let with = |name: &str, option: cri::NamespaceOption| {
        pod_with(|config| {
            let linux = config.linux.get_or_insert_default();
            linux.sysctls = [(name.to_owned(), "1".to_owned())].into();
            linux
                .security_context
                .get_or_insert_default()
                .namespace_options = Some(option);
        })
    };
    let node = i32::from(cri::NamespaceMode::Node);
    let network = cri::NamespaceOption {
        network: node,
        ..Default::default()
    };
    let ipc = cri::NamespaceOption {
        ipc: node,
        ..Default::default()
    };
    invalid(
        with("net.a", network.clone()),
        "config.linux.sysctls[\"net.a\"]",
    );
    invalid(
        with("kernel.sem", ipc),
        "config.linux.sysctls[\"kernel.sem\"]",
    );
    with("kernel.sem", network).unwrap();
}

#[test]
fn cgroup_parents_do_not_climb() {
    let parent = |text: &str| {
        pod_with(|config| config.linux.get_or_insert_default().cgroup_parent = text.to_owned())
    };
    for good in ["", "/kubepods/burstable/pod1", "kubepods-pod1.slice"] {
        parent(good).expect(good);
    }
    for bad in ["/../x", "a/..", "/a/./b", "/a\nb"] {
        invalid(parent(bad), "config.linux.cgroup_parent");
    }
}

#[test]
fn namespaces_of_a_pod() {
    let mode = |mode: cri::NamespaceMode| i32::from(mode);
    let none = cri::NamespaceOption::default;
    let spec = pod_options(none()).unwrap();
    assert_eq!(
        spec.namespaces.pid,
        PidMode::Pod,
        "POD is 0: asked for as soon as options are given"
    );
    let spec = pod_options(cri::NamespaceOption {
        network: mode(cri::NamespaceMode::Node),
        pid: mode(cri::NamespaceMode::Container),
        ..none()
    })
    .unwrap();
    assert_eq!(
        (spec.namespaces.network, spec.namespaces.pid),
        (Namespace::Node, PidMode::Container)
    );

    let options = "config.linux.security_context.namespace_options";
    let bad = |option, field: &str| invalid(pod_options(option), &format!("{options}.{field}"));
    bad(
        cri::NamespaceOption {
            network: mode(cri::NamespaceMode::Container),
            ..none()
        },
        "network",
    );
    bad(
        cri::NamespaceOption {
            ipc: mode(cri::NamespaceMode::Target),
            ..none()
        },
        "ipc",
    );
    bad(
        cri::NamespaceOption {
            network: 99,
            ..none()
        },
        "network",
    );
    bad(
        cri::NamespaceOption {
            target_id: "abc".into(),
            ..none()
        },
        "target_id",
    );
    bad(
        cri::NamespaceOption {
            pid: mode(cri::NamespaceMode::Target),
            ..none()
        },
        "target_id",
    );
    let target = cri::NamespaceOption {
        pid: mode(cri::NamespaceMode::Target),
        target_id: "abc".into(),
        ..none()
    };
    bad(target, "pid");
}

#[test]
fn user_namespaces_are_checked_and_then_not_done_yet() {
    let option = |mode: cri::NamespaceMode, uids: &[(u32, u32, u32)]| {
        let mappings: Vec<_> = uids
            .iter()
            .map(|(container_id, host_id, length)| cri::IdMapping {
                container_id: *container_id,
                host_id: *host_id,
                length: *length,
            })
            .collect();
        pod_options(cri::NamespaceOption {
            userns_options: Some(cri::UserNamespace {
                mode: mode.into(),
                uids: mappings.clone(),
                gids: mappings,
            }),
            ..Default::default()
        })
    };
    let options = "config.linux.security_context.namespace_options.userns_options";
    assert!(
        option(cri::NamespaceMode::Node, &[])
            .unwrap()
            .namespaces
            .user
            .is_none()
    );
    let user = option(cri::NamespaceMode::Pod, &[(0, 65536, 65536)]);
    let user = user.unwrap().namespaces.user.unwrap();
    assert_eq!((user.uids[0].host_id, user.gids[0].length), (65536, 65536));
    invalid(
        option(cri::NamespaceMode::Node, &[(0, 65536, 65536)]),
        options,
    );
    invalid(
        option(cri::NamespaceMode::Container, &[]),
        &format!("{options}.mode"),
    );
    invalid(
        option(cri::NamespaceMode::Pod, &[]),
        &format!("{options}.uids"),
    );
    invalid(
        option(cri::NamespaceMode::Pod, &[(1, 65536, 65536)]),
        &format!("{options}.uids"),
    );
    invalid(
        option(cri::NamespaceMode::Pod, &[(0, 65536, 1), (1, 70000, 1)]),
        &format!("{options}.uids"),
    );
    invalid(
        option(cri::NamespaceMode::Pod, &[(0, u32::MAX, 2)]),
        &format!("{options}.uids[0]"),
    );
    invalid(
        option(cri::NamespaceMode::Pod, &[(0, 5, 0)]),
        &format!("{options}.uids[0]"),
    );
}

#[test]
fn ids_are_in_range_and_a_group_needs_a_user() {
    let context = "config.linux.security_context";
    invalid(
        pod_context(|c| c.run_as_group = id(1)),
        &format!("{context}.run_as_group"),
    );
    invalid(
        pod_context(|c| c.run_as_user = id(-1)),
        &format!("{context}.run_as_user"),
    );
    invalid(
        context_with(|c| c.run_as_group = id(1)),
        &format!("{context}.run_as_group"),
    );
    invalid(
        context_with(|c| c.run_as_user = id(1 << 32)),
        &format!("{context}.run_as_user"),
    );
    invalid(
        context_with(|c| c.run_as_user = id(0xffff_ffff)),
        &format!("{context}.run_as_user"),
    );
    invalid(
        context_with(|c| c.supplemental_groups = vec![0, -5]),
        &format!("{context}.supplemental_groups[1]"),
    );
    invalid(
        context_with(|c| c.supplemental_groups_policy = 9),
        &format!("{context}.supplemental_groups_policy"),
    );
    for bad in ["root:x", "a\nb", "a/b"] {
        let outcome = context_with(|c| c.run_as_username = bad.into());
        invalid(outcome, &format!("{context}.run_as_username"));
    }
    let spec = context_with(|c| {
        c.run_as_username = "www-data".into();
        c.run_as_group = id(33);
    });
    assert_eq!(spec.unwrap().security.user.gid, Some(33));
}

#[test]
fn a_plain_container_is_accepted() {
    let spec = container_with(|_| {}).unwrap();
    assert_eq!(
        spec.security.seccomp,
        SeccompProfile::Unconfined,
        "CRI: a nil profile is unconfined"
    );
    assert_eq!(spec.security.pid, PidMode::Container);
    assert_eq!(spec.stop_signal, None);
}

#[test]
fn a_container_needs_a_name_and_an_image() {
    let pod = pod_spec(&pod_request(), &node()).unwrap();
    invalid(container_spec(None, &pod, &node()), "config");
    invalid(container_with(|c| c.metadata = None), "config.metadata");
    invalid(
        container_with(|c| c.metadata = Some(Default::default())),
        "config.metadata.name",
    );
    invalid(container_with(|c| c.image = None), "config.image");
    invalid(
        container_with(|c| c.image = Some(Default::default())),
        "config.image.image",
    );
    let spaced = cri::ImageSpec {
        image: "a b".into(),
        ..Default::default()
    };
    invalid(
        container_with(|c| c.image = Some(spaced)),
        "config.image.image",
    );
}

#[test]
fn programs_and_environment_are_checked() {
    invalid(
        container_with(|c| c.command = vec!["a\0".into()]),
        "config.command[0]",
    );
    invalid(
        container_with(|c| c.args = vec!["a".into(), "\0".into()]),
        "config.args[1]",
    );
    invalid(
        container_with(|c| c.working_dir = "app".into()),
        "config.working_dir",
    );
    let env = |key: &str, value: &[u8]| {
        container_with(|c| {
            c.envs = vec![cri::KeyValue {
                key: key.into(),
                value: value.into(),
            }]
        })
    };
    invalid(env("", b"v"), "config.envs[0].key");
    invalid(env("A=B", b"v"), "config.envs[0].key");
    invalid(env("A", b"secret\0"), "config.envs[0].value");
    let text = env("A", b"secret\0").unwrap_err().to_string();
    assert!(
        !text.contains("secret"),
        "values stay out of messages: {text}"
    );
    assert_eq!(env("A.b-c", &[0xff]).unwrap().env[0].value, [0xff]);
}

#[test]
fn log_paths_stay_below_the_pods_directory() {
    for bad in ["/etc/passwd", "../x.log", "a/../../x", "a\0"] {
        invalid(
            container_with(|c| c.log_path = bad.into()),
            "config.log_path",
        );
    }
    container_with(|c| c.log_path = "nginx/0.log".into()).unwrap();
}

#[test]
fn bad_mounts_are_refused() {
    let field = |name: &str| format!("config.mounts[0].{name}");
    invalid(
        mount_with(|m| m.container_path = "data".into()),
        &field("container_path"),
    );
    invalid(
        mount_with(|m| m.container_path.clear()),
        &field("container_path"),
    );
    invalid(
        mount_with(|m| m.container_path = "/".into()),
        &field("container_path"),
    );
    invalid(
        mount_with(|m| m.container_path = "/a/../..".into()),
        &field("container_path"),
    );
    invalid(
        mount_with(|m| m.host_path = "srv".into()),
        &field("host_path"),
    );
    invalid(mount_with(|m| m.host_path.clear()), &field("host_path"));
    invalid(
        mount_with(|m| m.host_path = "/srv/../etc".into()),
        &field("host_path"),
    );
    invalid(mount_with(|m| m.propagation = 3), &field("propagation"));
    invalid(
        mount_with(|m| m.mount_options = vec!["suid".into()]),
        &field("mount_options[0]"),
    );
    invalid(
        mount_with(|m| m.image_sub_path = "x".into()),
        &field("image_sub_path"),
    );
    let mapping = cri::IdMapping {
        container_id: 0,
        host_id: 0,
        length: 0,
    };
    invalid(
        mount_with(|m| m.uid_mappings = vec![mapping]),
        &field("uidMappings[0]"),
    );
    let spec = mount_with(|m| {
        m.container_path = "/data//x/../y/".into();
        m.mount_options = vec!["noexec".into()];
        m.propagation = cri::MountPropagation::PropagationBidirectional.into();
    })
    .unwrap();
    assert_eq!(spec.mounts[0].container_path, "/data/y");
    assert_eq!(spec.mounts[0].propagation, Propagation::Bidirectional);
}

#[test]
fn recursive_read_only_needs_readonly_and_private() {
    let field = "config.mounts[0].recursive_read_only";
    invalid(mount_with(|m| m.recursive_read_only = true), field);
    invalid(
        mount_with(|m| {
            m.recursive_read_only = true;
            m.readonly = true;
            m.propagation = cri::MountPropagation::PropagationHostToContainer.into();
        }),
        field,
    );
    mount_with(|m| {
        m.recursive_read_only = true;
        m.readonly = true;
    })
    .unwrap();
}

#[test]
fn image_mounts_are_checked() {
    let image = |change: fn(&mut cri::Mount)| {
        mount_with(|m| {
            m.image = Some(cri::ImageSpec {
                image: "registry.test/data".into(),
                ..Default::default()
            });
            m.host_path.clear();
            m.readonly = true;
            change(m);
        })
    };
    let mounts = image(|_| {}).unwrap().mounts;
    assert_eq!(
        mounts[0].image.as_ref().unwrap().image,
        "registry.test/data"
    );
    invalid(
        image(|m| m.host_path = "/srv".into()),
        "config.mounts[0].host_path",
    );
    invalid(image(|m| m.readonly = false), "config.mounts[0].readonly");
    invalid(image(|m| m.propagation = 1), "config.mounts[0].propagation");
    invalid(
        image(|m| m.image_sub_path = "../x".into()),
        "config.mounts[0].image_sub_path",
    );
    mount_with(|m| m.image = Some(Default::default())).expect("an empty image is none");
}

#[test]
fn devices_are_checked() {
    let device = |host: &str, inside: &str, permissions: &str| {
        container_with(|c| {
            c.devices = vec![cri::Device {
                host_path: host.into(),
                container_path: inside.into(),
                permissions: permissions.into(),
            }];
        })
    };
    let spec = device("/dev/fuse", "", "rwm").unwrap();
    assert_eq!(spec.devices[0].container_path, "/dev/fuse");
    invalid(
        device("dev/fuse", "/dev/fuse", "rw"),
        "config.devices[0].host_path",
    );
    invalid(
        device("/dev/fuse", "fuse", "rw"),
        "config.devices[0].container_path",
    );
    for bad in ["", "x", "rr", "rwx"] {
        invalid(
            device("/dev/fuse", "/dev/fuse", bad),
            "config.devices[0].permissions",
        );
    }
    let cdi =
        |name: &str| container_with(|c| c.cdi_devices = vec![cri::CdiDevice { name: name.into() }]);
    assert_eq!(
        cdi("vendor.com/gpu=0").unwrap().cdi_devices,
        ["vendor.com/gpu=0"]
    );
    for bad in [
        "",
        "gpu",
        "vendor/gpu",
        "/gpu=0",
        "vendor/=0",
        "vendor/gpu=",
        "1v/gpu=0",
        "v/g=../x",
    ] {
        invalid(cdi(bad), "config.CDI_devices[0].name");
    }
}

#[test]
fn capabilities_are_known_names() {
    let add = |name: &str| {
        context_with(|c| {
            c.capabilities = Some(cri::Capability {
                add_capabilities: vec![name.into()],
                ..Default::default()
            });
        })
    };
    for (given, name) in [
        ("CAP_NET_ADMIN", "NET_ADMIN"),
        ("sys_ptrace", "SYS_PTRACE"),
        ("ALL", "ALL"),
    ] {
        assert_eq!(add(given).unwrap().security.capabilities.add, [name]);
    }
    let field = "config.linux.security_context.capabilities.add_capabilities[0]";
    invalid(add("NET_ADMINS"), field);
    invalid(add(""), field);
}

#[test]
fn resources_are_checked_in_place() {
    let outcome = container_with(|c| {
        c.linux.get_or_insert_default().resources = Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: -5,
            ..Default::default()
        });
    });
    invalid(outcome, "config.linux.resources.memory_limit_in_bytes");
    let outcome = pod_with(|c| {
        c.linux.get_or_insert_default().overhead = Some(cri::LinuxContainerResources {
            cpu_shares: -5,
            ..Default::default()
        });
    });
    invalid(outcome, "config.linux.overhead.cpu_shares");
}

#[test]
fn masked_and_readonly_paths_are_absolute() {
    let context = "config.linux.security_context";
    invalid(
        context_with(|c| c.masked_paths = vec!["proc/kcore".into()]),
        &format!("{context}.masked_paths[0]"),
    );
    invalid(
        context_with(|c| c.readonly_paths = vec!["".into()]),
        &format!("{context}.readonly_paths[0]"),
    );
}

#[test]
fn seccomp_profiles_in_both_their_forms() {
    let new = |kind, name: &str| context_with(|c| c.seccomp = profile(kind, name));
    let old = |path: &str| context_with(|c| c.seccomp_profile_path = path.into());
    let of = |outcome: Result<ContainerSpec, Refused>| outcome.unwrap().security.seccomp;
    assert_eq!(
        of(new(ProfileType::RuntimeDefault, "")),
        SeccompProfile::RuntimeDefault
    );
    assert_eq!(
        of(new(ProfileType::Unconfined, "")),
        SeccompProfile::Unconfined
    );
    assert_eq!(of(old("runtime/default")), SeccompProfile::RuntimeDefault);
    assert_eq!(of(old("docker/default")), SeccompProfile::RuntimeDefault);
    assert_eq!(of(old("unconfined")), SeccompProfile::Unconfined);
    assert_eq!(of(old("")), SeccompProfile::Unconfined);
    let both = context_with(|c| {
        c.seccomp = profile(ProfileType::RuntimeDefault, "");
        c.seccomp_profile_path = "unconfined".into();
    });
    assert_eq!(
        of(both),
        SeccompProfile::RuntimeDefault,
        "the new field wins"
    );

    let context = "config.linux.security_context";
    for given in [
        new(ProfileType::Localhost, "/etc/p.json"),
        new(ProfileType::Localhost, "localhost//etc/p.json"),
        old("localhost//etc/p.json"),
    ] {
        assert_eq!(of(given), SeccompProfile::Localhost("/etc/p.json".into()));
    }
    invalid(
        new(ProfileType::Localhost, "p.json"),
        &format!("{context}.seccomp"),
    );
    invalid(
        new(ProfileType::Localhost, ""),
        &format!("{context}.seccomp.localhost_ref"),
    );
    invalid(
        new(ProfileType::Unconfined, "x"),
        &format!("{context}.seccomp.localhost_ref"),
    );
    invalid(old("nonsense"), &format!("{context}.seccomp_profile_path"));
    invalid(
        old("localhost/p.json"),
        &format!("{context}.seccomp_profile_path"),
    );
    invalid(
        context_with(|c| {
            c.seccomp = Some(cri::SecurityProfile {
                profile_type: 7,
                localhost_ref: String::new(),
            })
        }),
        &format!("{context}.seccomp.profile_type"),
    );
}

#[test]
fn a_configured_profile_stands_in_for_none() {
    let node = NodeFacts {
        unset_seccomp: SeccompProfile::RuntimeDefault,
        ..node()
    };
    let pod = pod_spec(&pod_request(), &node).unwrap();
    let spec = container_spec(Some(&container_config()), &pod, &node).unwrap();
    assert_eq!(spec.security.seccomp, SeccompProfile::RuntimeDefault);
}

#[test]
fn apparmor_profiles_in_both_their_forms() {
    let new = |kind, name: &str| context_with(|c| c.apparmor = profile(kind, name));
    let old = |name: &str| context_with(|c| c.apparmor_profile = name.into());
    let of = |outcome: Result<ContainerSpec, Refused>| outcome.unwrap().security.apparmor;
    assert_eq!(
        of(new(ProfileType::Unconfined, "")),
        AppArmorProfile::Unconfined
    );
    assert_eq!(of(old("runtime/default")), AppArmorProfile::RuntimeDefault);
    assert_eq!(of(old("")), AppArmorProfile::RuntimeDefault);
    let field = "config.linux.security_context.apparmor";
    unsupported(new(ProfileType::Localhost, "p"), field);
    unsupported(old("localhost/p"), field);
    invalid(old("p"), "config.linux.security_context.apparmor_profile");
    invalid(old("localhost/a\nb"), field);
}

#[test]
fn selinux_labels_are_taken_part_by_part() {
    let label = cri::SeLinuxOption {
        level: "s0:c1,c2".into(),
        ..Default::default()
    };
    let given = |label: cri::SeLinuxOption| context_with(|c| c.selinux_options = Some(label));
    let spec = given(label).unwrap();
    let taken = spec.security.selinux.unwrap();
    assert_eq!(
        (taken.level.as_str(), taken.r#type.as_str()),
        ("s0:c1,c2", "")
    );
    let none = given(cri::SeLinuxOption::default()).unwrap();
    assert_eq!(none.security.selinux, None);
    let field = "config.linux.security_context.selinux_options";
    let bad = cri::SeLinuxOption {
        r#type: "a:b".into(),
        ..Default::default()
    };
    invalid(
        context_with(|c| c.selinux_options = Some(bad)),
        &format!("{field}.type"),
    );
}

#[test]
fn a_privileged_container_needs_a_privileged_pod() {
    let field = "config.linux.security_context.privileged";
    invalid(context_with(|c| c.privileged = true), field);
    let pod = pod_context(|c| c.privileged = true).unwrap();
    let spec = container_in(&pod, |config| {
        let context = config
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        context.privileged = true;
        context.seccomp = profile(ProfileType::RuntimeDefault, "");
    })
    .unwrap();
    assert_eq!(spec.security.seccomp, SeccompProfile::Unconfined);
    assert_eq!(spec.security.apparmor, AppArmorProfile::Unconfined);
}

#[test]
fn a_container_lives_in_its_pods_namespaces() {
    let node_mode = i32::from(cri::NamespaceMode::Node);
    let pod = pod_options(cri::NamespaceOption {
        network: node_mode,
        ipc: node_mode,
        pid: cri::NamespaceMode::Container.into(),
        ..Default::default()
    })
    .unwrap();
    let spec = container_in(&pod, |_| {}).unwrap();
    assert_eq!(
        (spec.security.network, spec.security.ipc),
        (Namespace::Node, Namespace::Node)
    );
    let with_pid = |mode: cri::NamespaceMode, target: &str| {
        container_in(&pod, |config| {
            let linux = config.linux.get_or_insert_default();
            linux
                .security_context
                .get_or_insert_default()
                .namespace_options = Some(cri::NamespaceOption {
                pid: mode.into(),
                target_id: target.into(),
                ..Default::default()
            });
        })
    };
    assert_eq!(
        with_pid(cri::NamespaceMode::Pod, "").unwrap().security.pid,
        PidMode::Container
    );
    assert_eq!(
        with_pid(cri::NamespaceMode::Node, "").unwrap().security.pid,
        PidMode::Node
    );
    let options = "config.linux.security_context.namespace_options";
    assert_eq!(
        with_pid(cri::NamespaceMode::Target, "abc")
            .unwrap()
            .security
            .pid,
        PidMode::Target("abc".into())
    );
    invalid(
        with_pid(cri::NamespaceMode::Target, "../abc"),
        &format!("{options}.target_id"),
    );
}

#[test]
fn a_container_asks_for_no_other_namespaces_than_its_pods() {
    use cri::NamespaceMode::{Node, Pod};
    let user = |of: cri::NamespaceMode| {
        let range = cri::IdMapping {
            container_id: 0,
            host_id: 65536,
            length: 65536,
        };
        let ranges = match of {
            Pod => vec![range],
            _ => Vec::new(),
        };
        Some(cri::UserNamespace {
            mode: of.into(),
            uids: ranges.clone(),
            gids: ranges,
        })
    };
    let modes = |network: cri::NamespaceMode, ipc: cri::NamespaceMode| cri::NamespaceOption {
        network: network.into(),
        ipc: ipc.into(),
        ..Default::default()
    };
    let ask = |pod: &cri::NamespaceOption, container: &cri::NamespaceOption| {
        container_in(&pod_options(pod.clone()).unwrap(), |config| {
            let linux = config.linux.get_or_insert_default();
            linux
                .security_context
                .get_or_insert_default()
                .namespace_options = Some(container.clone());
        })
    };
    let options = "config.linux.security_context.namespace_options";
    let all = [(Pod, Pod), (Pod, Node), (Node, Pod), (Node, Node)];
    for (network, ipc) in all {
        let pod = modes(network, ipc);
        // Equal, as the kubelet has it, or unset, as crictl's users may.
        for container in [pod.clone(), cri::NamespaceOption::default()] {
            let spec = ask(&pod, &container).unwrap();
            let pods = pod_options(pod.clone()).unwrap().namespaces;
            assert_eq!(
                (spec.security.network, spec.security.ipc),
                (pods.network, pods.ipc)
            );
        }
    }
    invalid(
        ask(&modes(Pod, Node), &modes(Node, Node)),
        &format!("{options}.network"),
    );
    invalid(
        ask(&modes(Node, Pod), &modes(Node, Node)),
        &format!("{options}.ipc"),
    );

    let mapped = cri::NamespaceOption {
        userns_options: user(Pod),
        ..Default::default()
    };
    ask(&mapped, &mapped).unwrap();
    for userns_options in [user(Pod), user(Node), None] {
        let container = cri::NamespaceOption {
            pid: Node.into(),
            userns_options,
            ..Default::default()
        };
        let refused = ask(&mapped, &container);
        let words = refused.as_ref().unwrap_err().to_string();
        assert!(
            words.contains("NODE is not possible in a user namespace"),
            "{words}"
        );
        invalid(refused, &format!("{options}.pid"));
    }
}

#[test]
fn stop_signals_are_linux_numbers_afterwards() {
    let signal = |value: i32| container_with(|c| c.stop_signal = value);
    assert_eq!(
        signal(cri::Signal::Sigusr1.into()).unwrap().stop_signal,
        Some(10)
    );
    invalid(signal(66), "config.stop_signal");
    invalid(signal(-1), "config.stop_signal");
}
