use super::*;

const MOUNTINFO: &str = "\
    21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
    30 21 0:20 / SELINUXFS rw,nosuid,noexec,relatime shared:9 - selinuxfs selinuxfs rw\n";

const LXC: &str = "\
    # a comment = x\n\
    process = \"system_u:system_r:container_t:s0\"\n\
    content = \"system_u:object_r:virt_var_lib_t:s0\"\n\
    file = \"system_u:object_r:container_file_t:s0\"\n\
    ro_file=\"system_u:object_r:container_ro_file_t:s0\"\n\
    kvm_process = \"system_u:system_r:container_kvm_t:s0\"\n\
    init_process = \"system_u:system_r:container_init_t:s0\"\n";

/// A node's files in a directory, as the kernel and a policy would have them.
struct Node {
    dir: tempfile::TempDir,
    places: Places,
}

impl Node {
    fn new() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let places = Places {
            mountinfo: at("mountinfo"),
            current: at("current"),
            etc: at("etc"),
        };
        fs::create_dir_all(at("selinux")).unwrap();
        fs::create_dir_all(at("etc/mcs/contexts")).unwrap();
        let mountinfo = MOUNTINFO.replace("SELINUXFS", at("selinux").to_str().unwrap());
        for (name, text) in [
            ("mountinfo", mountinfo.as_str()),
            ("current", "system_u:system_r:container_runtime_t:s0\0"),
            ("selinux/enforce", "1"),
            ("selinux/mls", "1"),
            ("selinux/context", ""),
            (
                "etc/config",
                "SELINUX=enforcing\n# SELINUXTYPE=x\nSELINUXTYPE=mcs\n",
            ),
            ("etc/mcs/contexts/lxc_contexts", LXC),
        ] {
            fs::write(at(name), text).unwrap();
        }
        Node { dir, places }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn detect(&self) -> Result<Found, SelinuxError> {
        Selinux::detect(&self.places, CATEGORIES)
    }

    fn enabled(&self) -> Selinux {
        match self.detect().unwrap() {
            Found::Enabled(selinux) => *selinux,
            Found::Absent(why) | Found::Unusable(why) => panic!("{why}"),
        }
    }
}

fn label(user: &str, role: &str, kind: &str, level: &str) -> SelinuxLabel {
    SelinuxLabel {
        user: user.into(),
        role: role.into(),
        r#type: kind.into(),
        level: level.into(),
    }
}

#[test]
fn a_node_is_what_its_files_say() {
    let node = Node::new();
    let selinux = node.enabled();
    assert!(selinux.is_enforcing());
    assert_eq!(selinux.policy(), "mcs");
    assert_eq!(selinux.usual_process(), "system_u:system_r:container_t:s0");
    node.write("selinux/enforce", "0");
    assert!(!node.enabled().is_enforcing());
    node.write("current", "kernel\0");
    assert!(matches!(node.detect(), Ok(Found::Unusable(_))));
    node.write("mountinfo", "21 1 8:1 / / rw - ext4 selinuxfs rw\n");
    assert!(matches!(node.detect(), Ok(Found::Absent(_))));
}

#[test]
fn a_policy_without_contexts_is_no_use_and_a_broken_one_an_error() {
    let node = Node::new();
    let contexts = "etc/mcs/contexts/lxc_contexts";
    node.write(contexts, "process = \"a:b\"\nfile = \"a:b:c:s0\"\n");
    assert!(matches!(node.detect(), Err(SelinuxError::NotALabel { .. })));
    node.write(contexts, "file = \"a:b:c:s0\"\n");
    assert!(matches!(node.detect(), Err(SelinuxError::NotALabel { .. })));
    fs::remove_file(node.dir.path().join(contexts)).unwrap();
    assert!(matches!(node.detect(), Ok(Found::Unusable(_))));
}

#[test]
fn the_policys_name_is_a_name() {
    assert_eq!(policy_name("SELINUXTYPE=mcs\n"), "mcs");
    assert_eq!(policy_name("#SELINUXTYPE=a\n  SELINUXTYPE=b \n"), "b");
    for text in ["", "SELINUXTYPE=", "SELINUXTYPE=../../tmp"] {
        assert_eq!(policy_name(text), "targeted", "{text}");
    }
}

#[test]
fn pods_have_levels_of_their_own() {
    let selinux = Node::new().enabled_kept();
    let mut taken = HashSet::new();
    for seed in [7, 7, 7, u64::MAX] {
        let labels = selinux.1.of_pod(None, seed, &taken).unwrap();
        let pair = labels.pair().unwrap();
        assert!(
            labels
                .process
                .starts_with("system_u:system_r:container_t:s0:c")
        );
        assert!(
            labels
                .mount
                .starts_with("system_u:object_r:container_file_t:s0:c")
        );
        assert_eq!(
            labels.process.rsplit_once(':').unwrap().1,
            labels.mount.rsplit_once(':').unwrap().1
        );
        assert!(taken.insert(pair), "{pair:?} twice");
    }
}

impl Node {
    /// With the directory, which the kernel's side of it is in.
    fn enabled_kept(self) -> (Node, Selinux) {
        let selinux = self.enabled();
        (self, selinux)
    }
}

#[test]
fn every_pair_is_had_once_and_then_none() {
    for categories in [2, 3, 5, 12] {
        let all = u64::from(categories * (categories - 1) / 2);
        let mut taken = HashSet::new();
        for seed in 0..all {
            let pair = Pair::free(seed * 7, categories, &taken).unwrap();
            assert!(pair.0 < pair.1 && pair.1 < categories, "{pair:?}");
            assert!(taken.insert(pair));
        }
        assert_eq!(taken.len() as u64, all);
        assert_eq!(Pair::free(0, categories, &taken), None);
    }
    let (node, _) = Node::new().enabled_kept();
    let Ok(Found::Enabled(two)) = Selinux::detect(&node.places, 2) else {
        panic!()
    };
    let one = two.of_pod(None, 0, &HashSet::new()).unwrap();
    let none = two.of_pod(None, 0, &HashSet::from([one.pair().unwrap()]));
    assert!(matches!(
        none,
        Err(SelinuxError::NoneFree { categories: 2 })
    ));
}

#[test]
fn a_level_that_is_asked_for_is_taken_whichever_way_it_is_written() {
    let (_node, selinux) = Node::new().enabled_kept();
    let asked = label("", "", "", "s0:c9,c3");
    let labels = selinux.of_pod(Some(&asked), 0, &HashSet::new()).unwrap();
    assert_eq!(labels.process, "system_u:system_r:container_t:s0:c9,c3");
    assert_eq!(labels.pair(), Some(Pair(3, 9)));
    assert_eq!(Pair::of_level("s0"), None);
    assert_eq!(Pair::of_level("s0:c1.c5"), None);
    assert_eq!(Pair::of_level("s0-s0:c0.c1023"), None);
}

#[test]
fn containers_share_the_pods_level_and_have_the_parts_they_ask_for() {
    let (_node, selinux) = Node::new().enabled_kept();
    let pod = selinux.of_pod(None, 0, &HashSet::new()).unwrap();
    let of = |asked| selinux.of_container(&pod, asked).unwrap();
    assert_eq!(of(Asked::default()), pod);
    let spc = label("", "", "spc_t", "");
    let asked = of(Asked {
        label: Some(&spc),
        ..Asked::default()
    });
    assert_eq!(asked.process, "system_u:system_r:spc_t:s0:c0,c1");
    assert!(asked.keeps_volumes() && !pod.keeps_volumes());
    let all = label("u", "r", "t", "s0:c4,c5");
    let asked = of(Asked {
        label: Some(&all),
        ..Asked::default()
    });
    assert_eq!(asked.process, "u:r:t:s0:c4,c5");
    assert_eq!(asked.mount, "u:object_r:container_file_t:s0:c4,c5");
    let init = of(Asked {
        init: true,
        ..Asked::default()
    });
    assert_eq!(init.process, "system_u:system_r:container_init_t:s0:c0,c1");
    let kvm = of(Asked {
        init: true,
        kvm: true,
        ..Asked::default()
    });
    assert_eq!(kvm.process, "system_u:system_r:container_kvm_t:s0:c0,c1");
}

#[test]
fn a_pods_type_is_its_containers() {
    let (_node, selinux) = Node::new().enabled_kept();
    let asked = label("", "", "web_t", "");
    let pod = selinux.of_pod(Some(&asked), 0, &HashSet::new()).unwrap();
    let container = selinux.of_container(
        &pod,
        Asked {
            init: true,
            ..Asked::default()
        },
    );
    assert_eq!(
        container.unwrap().process,
        "system_u:system_r:web_t:s0:c0,c1"
    );
}

#[test]
fn who_shares_the_host_has_no_process_label_but_labelled_files() {
    let (_node, selinux) = Node::new().enabled_kept();
    let pod = selinux.of_pod(None, 0, &HashSet::new()).unwrap();
    let own = label("", "", "t", "");
    for (asked, labelled) in [
        (
            Asked {
                privileged: true,
                ..Asked::default()
            },
            false,
        ),
        (
            Asked {
                privileged: true,
                label: Some(&own),
                ..Asked::default()
            },
            false,
        ),
        (
            Asked {
                with_host: true,
                ..Asked::default()
            },
            false,
        ),
        (
            Asked {
                with_host: true,
                label: Some(&own),
                ..Asked::default()
            },
            true,
        ),
    ] {
        let labels = selinux.of_container(&pod, asked).unwrap();
        assert_eq!(labels.mount, pod.mount, "{asked:?}");
        assert_eq!(!labels.process.is_empty(), labelled, "{asked:?}");
        assert!(!labels.keeps_volumes());
    }
}

#[test]
fn what_the_kernel_is_asked_and_what_it_refuses() {
    let (node, selinux) = Node::new().enabled_kept();
    let pod = selinux.of_pod(None, 0, &HashSet::new()).unwrap();
    let asked = fs::read_to_string(node.dir.path().join("selinux/context")).unwrap();
    assert_eq!(asked, pod.mount, "the last one asked for");
    // As where the kernel says EINVAL: a write that fails.
    fs::remove_file(node.dir.path().join("selinux/context")).unwrap();
    std::os::unix::fs::symlink("/dev/full", node.dir.path().join("selinux/context")).unwrap();
    let refused = selinux.of_pod(None, 0, &HashSet::new());
    let Err(SelinuxError::Unknown { label, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(label, pod.process);
}

#[test]
fn levels_are_checked() {
    for good in [
        "s0",
        "s15",
        "s0:c1",
        "s0:c1,c2",
        "s0:c0.c1023",
        "s0-s15:c0.c5,c9",
        "s0:c1-s1:c1.c3",
    ] {
        check_level(good).unwrap();
    }
    for bad in [
        "",
        "c1",
        "s0,c4,c5",
        "s0:",
        "s0:c1:c2",
        "s0:c1,",
        "s0:c12345",
        "s0:c1.c2.c3",
        "s0-",
        "s",
        "s0 ",
    ] {
        assert!(
            matches!(check_level(bad), Err(SelinuxError::BadLevel { .. })),
            "{bad:?}"
        );
    }
    let (_node, selinux) = Node::new().enabled_kept();
    let asked = label("", "", "", "s0,c4,c5");
    let refused = selinux
        .of_pod(Some(&asked), 0, &HashSet::new())
        .unwrap_err();
    assert!(refused.to_string().contains("s0,c4,c5"), "{refused}");
}

#[test]
fn a_policy_without_levels_gives_none() {
    let node = Node::new();
    node.write("selinux/mls", "0");
    let lxc = "process = \"u:r:container_t\"\nfile = \"u:object_r:container_file_t\"\n";
    node.write("etc/mcs/contexts/lxc_contexts", lxc);
    let (_node, selinux) = node.enabled_kept();
    let pod = selinux.of_pod(None, 5, &HashSet::new()).unwrap();
    assert_eq!(pod.process, "u:r:container_t");
    assert_eq!(pod.mount, "u:object_r:container_file_t");
    assert_eq!(pod.pair(), None);
}
