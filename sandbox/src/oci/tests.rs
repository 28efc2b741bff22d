use super::*;
use crate::container_spec::{
    AppArmorProfile, ContainerName, DeviceRequest, EnvVar, GroupsPolicy, ImageRequest,
    MountRequest, Propagation, RunAs, SeccompProfile, SecurityContext,
};
use crate::image::ImageConfig;
use crate::pod_spec::{Namespace, PodName, PodNamespaces, PodSecurity, UserNamespace};
use std::path::Path;

/// Everything an [`Input`] borrows: an ordinary container of an ordinary pod.
pub(crate) struct Sample {
    pub pod_id: PodId,
    pub container_id: ContainerId,
    pub pod: PodSpec,
    pub container: ContainerSpec,
    pub image: ContainerImage,
    pub identity: Identity,
    pub files: PodFiles,
    pub namespaces: Namespaces,
    pub cgroup_path: String,
    pub image_volumes: BTreeMap<String, PathBuf>,
    pub defaults: Defaults,
    pub selinux: Option<Labels>,
}

impl Sample {
    pub fn new() -> Self {
        Self {
            pod_id: "a".repeat(64).parse().unwrap(),
            container_id: "b".repeat(64).parse().unwrap(),
            pod: PodSpec {
                name: PodName {
                    name: "web".into(),
                    namespace: "shop".into(),
                    uid: "1-2-3".into(),
                    attempt: 0,
                },
                hostname: "web".into(),
                log_directory: PathBuf::new(),
                dns: None,
                port_mappings: Vec::new(),
                labels: BTreeMap::new(),
                annotations: BTreeMap::new(),
                cgroup_parent: "/kubepods/pod1".into(),
                sysctls: BTreeMap::new(),
                namespaces: PodNamespaces::default(),
                overhead: None,
                resources: None,
                security: PodSecurity::default(),
                runtime_handler: String::new(),
            },
            container: ContainerSpec {
                name: ContainerName {
                    name: "server".into(),
                    attempt: 0,
                },
                image: ImageRequest {
                    image: "img:1".into(),
                    ..ImageRequest::default()
                },
                command: Vec::new(),
                args: Vec::new(),
                working_dir: String::new(),
                env: Vec::new(),
                mounts: Vec::new(),
                devices: Vec::new(),
                cdi_devices: Vec::new(),
                labels: BTreeMap::new(),
                annotations: BTreeMap::new(),
                log_path: PathBuf::new(),
                stdin: false,
                stdin_once: false,
                tty: false,
                resources: Resources::default(),
                security: SecurityContext {
                    privileged: false,
                    capabilities: crate::container_spec::Capabilities::default(),
                    network: Namespace::Pod,
                    ipc: Namespace::Pod,
                    pid: PidMode::Container,
                    user: RunAs::default(),
                    supplemental_groups: Vec::new(),
                    supplemental_groups_policy: GroupsPolicy::Merge,
                    readonly_rootfs: false,
                    no_new_privs: true,
                    masked_paths: vec!["/proc/kcore".into()],
                    readonly_paths: vec!["/proc/sys".into()],
                    seccomp: SeccompProfile::RuntimeDefault,
                    apparmor: AppArmorProfile::RuntimeDefault,
                    selinux: None,
                },
                stop_signal: None,
            },
            image: ContainerImage {
                id: "sha256:1".into(),
                repo_digest: "img@sha256:2".into(),
                config: ImageConfig {
                    entrypoint: vec!["/server".into()],
                    env: vec!["LANG=C".into(), "nonsense".into()],
                    ..ImageConfig::default()
                },
            },
            identity: Identity {
                uid: 1000,
                gid: 100,
                groups: vec![100, 7],
                home: "/home/x".into(),
            },
            files: PodFiles {
                resolv_conf: "/run/pod/resolv.conf".into(),
                hostname: "/run/pod/hostname".into(),
                hosts: "/run/pod/hosts".into(),
                shm: "/run/pod/shm".into(),
                hostname_text: "web".into(),
            },
            namespaces: Namespaces {
                network: Some("/run/pod/netns".into()),
                ipc: Some("/run/pod/ipc".into()),
                uts: Some("/run/pod/uts".into()),
                ..Namespaces::default()
            },
            cgroup_path: "/kubepods/pod1/berth-b".into(),
            image_volumes: BTreeMap::new(),
            defaults: Defaults::default(),
            selinux: None,
        }
    }

    pub fn build(&self) -> Result<Built, OciError> {
        build(&Input {
            pod_id: &self.pod_id,
            container_id: &self.container_id,
            pod: &self.pod,
            container: &self.container,
            image: &self.image,
            identity: &self.identity,
            files: &self.files,
            namespaces: &self.namespaces,
            cgroup_path: &self.cgroup_path,
            image_volumes: &self.image_volumes,
            selinux: self.selinux.as_ref(),
            defaults: &self.defaults,
            host_devices: true,
        })
    }

    pub fn spec(&self) -> oci::Spec {
        self.build().unwrap().spec
    }

    fn env(&mut self, name: &str, value: &[u8]) {
        self.container.env.push(EnvVar {
            name: name.into(),
            value: value.into(),
        });
    }
}

/// A writable private bind mount.
pub(crate) fn bind(host: impl Into<PathBuf>, inside: &str) -> MountRequest {
    MountRequest {
        container_path: inside.into(),
        host_path: host.into(),
        image: None,
        image_id: String::new(),
        image_sub_path: String::new(),
        readonly: false,
        recursive_readonly: false,
        selinux_relabel: false,
        propagation: Propagation::Private,
        uid_mappings: Vec::new(),
        gid_mappings: Vec::new(),
        options: Vec::new(),
    }
}

fn targets(spec: &oci::Spec) -> Vec<&str> {
    let mounts = spec.mounts().as_ref().unwrap();
    mounts
        .iter()
        .map(|mount| mount.destination().to_str().unwrap())
        .collect()
}

fn at<'a>(spec: &'a oci::Spec, target: &str) -> &'a oci::Mount {
    let mut mounts = spec.mounts().iter().flatten();
    mounts
        .find(|mount| mount.destination() == Path::new(target))
        .unwrap()
}

fn has(mount: &oci::Mount, option: &str) -> bool {
    mount.options().iter().flatten().any(|word| word == option)
}

const FILE_SYSTEMS: [&str; 6] = [
    "/proc",
    "/dev",
    "/dev/pts",
    "/dev/mqueue",
    "/sys",
    "/sys/fs/cgroup",
];

#[test]
fn later_environments_override_earlier_ones_in_place() {
    let mut sample = Sample::new();
    sample.defaults.env = vec![("LANG".into(), "D".into()), ("SITE".into(), "x".into())];
    sample.image.config.env.push("PATH=/opt".into());
    sample.env("LANG", b"en");
    sample.env("RAW", b"\xff=\xfe");
    let built = sample.build().unwrap();
    let expected: [&[u8]; 6] = [
        b"PATH=/opt",
        b"LANG=en",
        b"SITE=x",
        b"HOSTNAME=web",
        b"RAW=\xff=\xfe",
        b"HOME=/home/x",
    ];
    assert_eq!(built.raw_env, expected);
    let env = built
        .spec
        .process()
        .as_ref()
        .unwrap()
        .env()
        .clone()
        .unwrap();
    assert_eq!(env[4], "RAW=\u{fffd}=\u{fffd}");
    assert_eq!(env.len(), built.raw_env.len());
}

#[test]
fn a_terminal_has_a_type_and_a_set_home_stays() {
    let mut sample = Sample::new();
    sample.container.tty = true;
    sample.env("HOME", b"/elsewhere");
    let built = sample.build().unwrap();
    assert!(built.raw_env.contains(&b"TERM=xterm".to_vec()));
    assert!(built.raw_env.contains(&b"HOME=/elsewhere".to_vec()));
    assert!(!built.raw_env.contains(&b"HOME=/home/x".to_vec()));
    for (name, value) in [("", &b"x"[..]), ("A=B", b"x"), ("A", b"x\0y")] {
        let mut sample = Sample::new();
        sample.env(name, value);
        sample.build().unwrap_err();
    }
}

#[test]
fn an_ordinary_container_is_confined() {
    let sample = Sample::new();
    let spec = sample.spec();
    assert_eq!(
        targets(&spec),
        [
            &FILE_SYSTEMS[..],
            &[
                "/dev/shm",
                "/etc/resolv.conf",
                "/etc/hostname",
                "/etc/hosts"
            ]
        ]
        .concat()
    );
    let process = spec.process().as_ref().unwrap();
    assert_eq!(process.no_new_privileges(), Some(true));
    assert_eq!(process.oom_score_adj(), Some(0));
    assert_eq!(process.user().umask(), Some(0o022));
    assert_eq!(
        process.user().additional_gids().as_deref(),
        Some(&[100, 7][..])
    );
    let bounding = capability_set(process.capabilities().as_ref().unwrap().bounding().as_ref());
    assert_eq!(bounding, CapSet::defaults());
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(
        linux.masked_paths().as_deref(),
        Some(&["/proc/kcore".to_owned()][..])
    );
    assert_eq!(
        linux.readonly_paths().as_deref(),
        Some(&["/proc/sys".to_owned()][..])
    );
    assert!(has(at(&spec, "/sys"), "ro") && has(at(&spec, "/sys/fs/cgroup"), "ro"));
    assert_eq!(linux.devices().as_ref().unwrap().len(), 6);
    assert_eq!(device_rules(&spec), DeviceRule::defaults());
    let annotations = spec.annotations().as_ref().unwrap();
    assert_eq!(annotations["io.kubernetes.cri.container-type"], "container");
    assert_eq!(annotations["io.kubernetes.cri.sandbox-namespace"], "shop");
    assert_eq!(annotations["io.kubernetes.cri.image-name"], "img:1");
}

#[test]
fn a_privileged_container_is_not() {
    let mut sample = Sample::new();
    sample.container.security.privileged = true;
    sample.container.devices = vec![DeviceRequest {
        host_path: "/dev/null".into(),
        container_path: "/dev/zero".into(),
        permissions: "r".into(),
    }];
    let spec = sample.spec();
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(
        (linux.masked_paths(), linux.readonly_paths()),
        (&None, &None)
    );
    assert!(has(at(&spec, "/sys"), "rw") && has(at(&spec, "/sys/fs/cgroup"), "rw"));
    let process = spec.process().as_ref().unwrap();
    let bounding = capability_set(process.capabilities().as_ref().unwrap().bounding().as_ref());
    assert_eq!(bounding, sample.defaults.capabilities);
    assert_eq!(device_rules(&spec), [DeviceRule::everything()]);
    let namespaces = linux.namespaces().as_ref().unwrap();
    assert!(
        namespaces
            .iter()
            .all(|n| n.typ() != oci::LinuxNamespaceType::Cgroup)
    );
    // What was asked for replaces what the host has, and each path is there once.
    let devices = linux.devices().as_ref().unwrap();
    let zero: Vec<_> = devices
        .iter()
        .filter(|d| d.path() == Path::new("/dev/zero"))
        .collect();
    assert_eq!(zero.iter().map(|d| d.minor()).collect::<Vec<_>>(), [3]);
    assert!(devices.len() >= 6);
}

#[test]
fn no_masks_were_asked_for_means_none() {
    let mut sample = Sample::new();
    sample.container.security.masked_paths.clear();
    sample.container.security.readonly_paths.clear();
    let spec = sample.spec();
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.masked_paths().as_deref(), Some(&[][..]));
    assert_eq!(linux.readonly_paths().as_deref(), Some(&[][..]));
}

#[test]
fn parents_are_mounted_before_children_and_the_last_of_equals_wins() {
    let mut sample = Sample::new();
    sample.container.mounts = vec![
        bind("/1", "/data/a/b"),
        bind("/2", "/data"),
        bind("/3", "/etc/hosts"),
        bind("/4", "/data/a/../a/b/"),
        bind("/5", "/etc"),
        bind("/6", "/logs"),
    ];
    let spec = sample.spec();
    assert_eq!(
        targets(&spec)[FILE_SYSTEMS.len()..],
        [
            "/data",
            "/etc",
            "/logs",
            "/dev/shm",
            "/etc/resolv.conf",
            "/etc/hostname",
            "/etc/hosts",
            "/data/a/b",
        ]
    );
    assert_eq!(
        at(&spec, "/data/a/b").source().as_deref(),
        Some(Path::new("/4"))
    );
    assert_eq!(
        at(&spec, "/etc/hosts").source().as_deref(),
        Some(Path::new("/3"))
    );
}

#[test]
fn more_mounts_than_can_be_handed_over_are_refused_at_once() {
    let mut sample = Sample::new();
    sample.container.mounts = (0..300).map(|n| bind("/a", &format!("/m/{n}"))).collect();
    assert!(matches!(
        sample.build(),
        Err(OciError::TooManyMounts { count: 300 })
    ));
}

#[test]
fn what_a_mount_covers_is_not_mounted() {
    let mut sample = Sample::new();
    sample.container.mounts = vec![bind("/dev", "/dev"), bind("/sys", "/sys")];
    let spec = sample.spec();
    assert_eq!(
        targets(&spec),
        [
            "/proc",
            "/dev",
            "/sys",
            "/dev/shm",
            "/etc/resolv.conf",
            "/etc/hostname",
            "/etc/hosts"
        ]
    );
    assert_eq!(at(&spec, "/sys").typ().as_deref(), Some("bind"));
}

#[test]
fn mounts_say_what_was_asked_for() {
    let mut sample = Sample::new();
    sample.container.security.readonly_rootfs = true;
    let mut recursive = bind("/a", "/a");
    recursive.readonly = true;
    recursive.recursive_readonly = true;
    let mut slave = bind("/b", "/b");
    slave.propagation = Propagation::HostToContainer;
    slave.options = vec!["noexec".into()];
    let mut image = bind("", "/model");
    image.image = Some(ImageRequest {
        image: "model:1".into(),
        ..ImageRequest::default()
    });
    sample.container.mounts = vec![recursive.clone(), slave, image];
    assert!(matches!(
        sample.build(),
        Err(OciError::ImageNotMounted { .. })
    ));
    sample
        .image_volumes
        .insert("/model".into(), "/volumes/model".into());

    let spec = sample.spec();
    assert!(has(at(&spec, "/a"), "rro") && has(at(&spec, "/a"), "rprivate"));
    assert!(has(at(&spec, "/b"), "rslave") && has(at(&spec, "/b"), "noexec"));
    assert!(has(at(&spec, "/model"), "ro"));
    assert!(has(at(&spec, "/etc/resolv.conf"), "ro") && has(at(&spec, "/dev/shm"), "rw"));
    assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.rootfs_propagation().as_deref(), Some("rslave"));

    recursive.readonly = false;
    sample.container.mounts = vec![recursive.clone()];
    assert!(matches!(
        sample.build(),
        Err(OciError::BadRecursiveReadonly { .. })
    ));
    recursive.readonly = true;
    recursive.propagation = Propagation::Bidirectional;
    sample.container.mounts = vec![recursive];
    assert!(matches!(
        sample.build(),
        Err(OciError::BadRecursiveReadonly { .. })
    ));
    let mut odd = bind("/a", "/a");
    odd.options = vec!["suid".into()];
    sample.container.mounts = vec![odd];
    assert!(matches!(sample.build(), Err(OciError::BadOption { .. })));
}

#[test]
fn namespaces_are_the_pods_the_containers_or_the_hosts() {
    use oci::LinuxNamespaceType as T;
    let kinds = |sample: &Sample| {
        let spec = sample.spec();
        let all = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        all.iter()
            .map(|n| (n.typ(), n.path().is_some()))
            .collect::<Vec<_>>()
    };
    let mut sample = Sample::new();
    let all = kinds(&sample);
    assert!(all.contains(&(T::Pid, false)) && all.contains(&(T::Network, true)));
    assert!(all.contains(&(T::Cgroup, false)) && all.contains(&(T::Mount, false)));

    sample.namespaces.network = None;
    sample.namespaces.uts = None;
    sample.container.security.pid = PidMode::Node;
    let all = kinds(&sample);
    assert!(
        all.iter()
            .all(|(kind, _)| ![T::Network, T::Uts, T::Pid].contains(kind))
    );
    // The host's network shows in sysfs without being able to change it.
    assert_eq!(at(&sample.spec(), "/sys").typ().as_deref(), Some("sysfs"));
    assert_eq!(sample.spec().hostname(), &None);

    sample.container.security.pid = PidMode::Target("c".into());
    assert!(matches!(sample.build(), Err(OciError::NoNamespace { .. })));
    sample.namespaces.pid = Some("/proc/1/ns/pid".into());
    assert!(kinds(&sample).contains(&(T::Pid, true)));
}

#[test]
fn a_user_namespace_without_terminals_group_has_terminals_without_it() {
    let mut sample = Sample::new();
    let map = |length| {
        vec![IdMapping {
            container_id: 0,
            host_id: 100_000,
            length,
        }]
    };
    sample.pod.namespaces.user = Some(UserNamespace {
        uids: map(65_536),
        gids: map(65_536),
    });
    sample.namespaces.user = Some("/run/pod/user".into());
    let spec = sample.spec();
    assert!(has(at(&spec, "/dev/pts"), "gid=5"));
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.uid_mappings().as_ref().unwrap()[0].host_id(), 100_000);
    sample.pod.namespaces.user = Some(UserNamespace {
        uids: map(5),
        gids: map(5),
    });
    sample.namespaces.network = None;
    let spec = sample.spec();
    assert!(!has(at(&spec, "/dev/pts"), "gid=5"));
    assert!(has(at(&spec, "/sys"), "rro") && has(at(&spec, "/sys"), "rbind"));
}

#[test]
fn devices_come_with_their_rules() {
    let mut sample = Sample::new();
    sample.container.devices = vec![DeviceRequest {
        host_path: "/dev/zero".into(),
        container_path: "/dev/mine".into(),
        permissions: "r".into(),
    }];
    let rules = device_rules(&sample.spec());
    let expected = DeviceRule {
        allow: true,
        kind: DeviceKind::Char,
        major: Some(1),
        minor: Some(5),
        access: "r".into(),
    };
    assert_eq!(rules.last(), Some(&expected));
    assert_eq!(rules[..rules.len() - 1], DeviceRule::defaults());
}

#[test]
fn profiles_need_what_enforces_them() {
    let mut sample = Sample::new();
    let profile = |sample: &Sample| {
        sample.build().map(|b| {
            b.spec
                .process()
                .as_ref()
                .unwrap()
                .apparmor_profile()
                .clone()
        })
    };
    assert_eq!(profile(&sample).unwrap(), None);
    sample.container.security.apparmor = AppArmorProfile::Localhost("mine".into());
    assert!(matches!(profile(&sample), Err(OciError::NoAppArmor { .. })));
    sample.defaults.apparmor = true;
    assert_eq!(profile(&sample).unwrap().as_deref(), Some("mine"));
    sample.container.security.apparmor = AppArmorProfile::RuntimeDefault;
    assert_eq!(profile(&sample).unwrap(), None);
    sample.defaults.apparmor_profile = Some("berth-default".into());
    assert_eq!(profile(&sample).unwrap().as_deref(), Some("berth-default"));
    sample.container.security.privileged = true;
    assert_eq!(profile(&sample).unwrap(), None);
}

#[test]
fn limits_are_named_as_in_a_config_and_numbered_as_in_the_kernel() {
    assert_eq!(Rlimit::named("nofile"), Some(Rlimit::Nofile));
    assert_eq!(Rlimit::named("RLIMIT_MEMLOCK"), Some(Rlimit::Memlock));
    assert_eq!(Rlimit::named("nofiles"), None);
    for kind in Rlimit::ALL {
        assert_eq!(Rlimit::number(kind.oci()), kind as u32);
    }
}

#[test]
fn defaults_within_the_hosts_limits_can_be_set() {
    let defaults = Defaults::default().within_host_limits();
    let (soft, hard) = defaults.rlimits[&Rlimit::Nofile];
    assert!(soft <= hard && hard <= 524_288);
    assert!(CapSet::up_to(40).contains(defaults.capabilities));
    let mut sample = Sample::new();
    sample.defaults.least_oom_score_adj = 100;
    sample.container.resources.oom_score_adj = Some(-997);
    assert_eq!(
        sample.spec().process().as_ref().unwrap().oom_score_adj(),
        Some(100)
    );
}

#[test]
fn a_spec_survives_json() {
    let spec = Sample::new().spec();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<oci::Spec>(&text).unwrap(), spec);
}
