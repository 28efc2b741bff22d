//! OCI hooks, as CDI devices bring them: when, where and with what they are run,
//! and what becomes of a start when one fails or hangs.

use crate::crashes::points;
use berth_proto::runtime_v1::{self as cri, ContainerState, NamespaceMode};
use berth_tests::deadline::eventually;
use berth_tests::{Container, LinuxConfig as _, Node, Pod};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const HANDLERS: [&str; 3] = ["", "runc", "crun"];
const DEVICE: &str = "vendor.com/hooked=0";

/// A node whose CDI files are in a directory of its own, and what hooks write.
struct Ground {
    node: Node,
    dir: tempfile::TempDir,
}

impl Ground {
    fn new() -> Ground {
        let dir = tempfile::tempdir().unwrap();
        // Hooks of pods in user namespaces are somebody without rights on the host.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["cdi", "seen"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let seen = dir.path().join("seen");
        fs::set_permissions(seen, fs::Permissions::from_mode(0o777)).unwrap();
        let text = format!(
            "[runtime]\ncdi_spec_dirs = [{:?}]\n",
            dir.path().join("cdi")
        );
        let node = Node::options().config(&text).start();
        Ground { node, dir }
    }

    fn seen(&self) -> PathBuf {
        self.dir.path().join("seen")
    }

    fn read(&self, name: &str) -> String {
        let path = self.seen().join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap()
    }

    /// A program of the host that does this; $seen is where to write, $1 is its kind.
    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        let seen = self.seen();
        let text = format!("#!/bin/sh\nseen={}\n{text}\n", seen.display());
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// The device has these hooks from now on.
    fn hooks(&self, hooks: &[Value]) {
        let file = json!({
            "cdiVersion": "0.6.0",
            "kind": "vendor.com/hooked",
            "devices": [{"name": "0", "containerEdits": {"env": ["HOOKED=1"], "hooks": hooks}}],
        });
        fs::write(self.dir.path().join("cdi/hooked.json"), file.to_string()).unwrap();
    }
}

fn hook(kind: &str, path: &Path) -> Value {
    json!({"hookName": kind, "path": path, "args": ["hook", kind], "timeout": 60})
}

fn hooked(pod: &Pod<'_>, command: &[&str]) -> cri::ContainerConfig {
    let mut config = pod.container(command);
    config.cdi_devices.push(cri::CdiDevice {
        name: DEVICE.into(),
    });
    config
}

fn sleeper<'n>(pod: &Pod<'n>) -> Container<'n> {
    pod.create(hooked(pod, &["sleep", "1000"]))
}

/// Pids of the host's that have the word in their command line.
fn running(word: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command)
            .split('\0')
            .any(|part| part == word)
        {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found
}

fn eventually_none(word: &str) {
    eventually("the hook's processes are gone", || {
        running(word).is_empty().then_some(())
    });
}

/// A sleep that no other test has.
fn nap(node: &Node) -> String {
    let digits: String = node
        .fresh("nap")
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    format!("7{}{digits}", std::process::id())
}

fn namespace(pid: impl std::fmt::Display, kind: &str) -> String {
    let link = fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    link.to_string_lossy().into_owned()
}

const NAMESPACES: [&str; 5] = ["mnt", "net", "ipc", "uts", "pid"];

/// Writes down all that a hook can tell of itself.
const WITNESS: &str = r#"
cat > $seen/$1.state
exec 9< /proc/self/environ
tr '\0' '\n' <&9 > $seen/$1.env
exec 9<&-
for kind in mnt net ipc uts pid; do
    echo $kind $(readlink /proc/self/ns/$kind)
done > $seen/$1.ns
pwd > $seen/$1.cwd
bundle=$(sed 's/.*"bundle":"\([^"]*\)".*/\1/' $seen/$1.state)
root=$(sed 's/.*"root":{[^}]*"path":"\([^"]*\)".*/\1/' $bundle/config.json)
ls $bundle/$root > $seen/$1.root
ls $bundle/$root/proc > $seen/$1.proc
umask > $seen/$1.umask
cat /proc/self/oom_score_adj > $seen/$1.oom
echo $1 >> $seen/order
"#;

#[test]
fn each_kind_is_run_at_its_moment_in_its_namespaces_with_its_state() {
    let ground = Ground::new();
    let witness = ground.script("witness", WITNESS);
    let script = "cat > /seen/startContainer.state; id -u > /seen/startContainer.user; \
        ls / > /seen/startContainer.root; echo startContainer >> /seen/order";
    let mut hooks: Vec<Value> = [
        "prestart",
        "createRuntime",
        "createContainer",
        "poststart",
        "poststop",
    ]
    .iter()
    .map(|kind| hook(kind, &witness))
    .collect();
    hooks[1]["env"] = json!(["ONLY=this", "AND=that"]);
    hooks.push(
        json!({"hookName": "startContainer", "path": "/bin/sh", "args": ["sh", "-c", script],
        "env": ["PATH=/bin"]}),
    );
    ground.hooks(&hooks);
    let pod = ground.node.run_pod("web");
    let mut config = hooked(
        &pod,
        &["sh", "-c", "echo program >> /seen/order; exec sleep 1000"],
    );
    config.mount(ground.seen(), "/seen");
    let container = pod.create(config);
    assert!(
        !ground.seen().join("order").exists(),
        "CreateContainer runs none"
    );
    container.start().unwrap();
    let init = container.init_pid();
    eventually("the program has said so", || {
        ground.read("order").contains("program").then_some(())
    });
    let order = ground.read("order");
    let order: Vec<_> = order.lines().collect();
    assert_eq!(
        order[..4],
        [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer"
        ]
    );
    assert_eq!(order.len(), 6, "{order:?}");
    // StartContainer has waited for poststart.
    assert!(order.contains(&"poststart"));

    let daemon = ground.node.daemon_pid().unwrap();
    let of = |pid: String| -> Vec<String> {
        NAMESPACES
            .iter()
            .map(|kind| format!("{kind} {}", namespace(&pid, kind)))
            .collect()
    };
    let said = |kind: &str| -> Vec<String> {
        ground
            .read(&format!("{kind}.ns"))
            .lines()
            .map(str::to_owned)
            .collect()
    };
    for kind in ["prestart", "createRuntime", "poststart"] {
        assert_eq!(said(kind), of(daemon.to_string()), "{kind}");
    }
    assert_eq!(said("createContainer"), of(init.to_string()));

    let expected = [
        ("prestart", "creating", Some(init)),
        ("createRuntime", "creating", Some(init)),
        ("createContainer", "creating", Some(1)),
        ("startContainer", "created", Some(1)),
        ("poststart", "running", Some(init)),
    ];
    let bundle = ground.node.root().join("run/bundles").join(&container.id);
    let check = |(kind, status, pid): (&str, &str, Option<i32>)| {
        let state = ground.json(&format!("{kind}.state"));
        assert_eq!(state["id"], container.id.as_str(), "{kind}");
        assert_eq!(state["status"], status, "{kind}");
        assert_eq!(state["bundle"], bundle.to_str().unwrap(), "{kind}");
        assert_eq!(state["ociVersion"], "1.2.0", "{kind}");
        assert_eq!(state["pid"].as_i64(), pid.map(i64::from), "{kind}");
        let annotations = &state["annotations"];
        assert_eq!(
            annotations["io.kubernetes.cri.sandbox-id"],
            pod.id.as_str(),
            "{kind}"
        );
    };
    expected.into_iter().for_each(check);

    // What is in the bundle is true: the root is there, for the container's with its mounts.
    for kind in ["prestart", "createRuntime", "createContainer", "poststart"] {
        assert!(
            ground.read(&format!("{kind}.root")).contains("bin"),
            "{kind}"
        );
        assert_eq!(
            ground.read(&format!("{kind}.cwd")).trim(),
            bundle.to_str().unwrap()
        );
        assert_eq!(
            ground.read(&format!("{kind}.umask")).trim(),
            "0022",
            "{kind}"
        );
        assert_eq!(
            ground.read(&format!("{kind}.oom")).trim(),
            if kind == "createContainer" {
                fs::read_to_string(format!("/proc/{init}/oom_score_adj"))
                    .unwrap()
                    .trim()
                    .to_owned()
            } else {
                "0".to_owned()
            },
            "{kind}"
        );
        let env = ground.read(&format!("{kind}.env"));
        let expected = if kind == "createRuntime" {
            "ONLY=this\nAND=that\n"
        } else {
            ""
        };
        assert_eq!(env, expected, "{kind}");
    }
    assert!(ground.read("createContainer.proc").contains("self"));
    assert_eq!(ground.read("createRuntime.proc"), "");
    assert!(ground.read("startContainer.root").contains("seen"));

    assert!(!ground.read("order").contains("poststop"));
    container.stop(0).unwrap();
    eventually("poststop has been run", || {
        ground.read("order").contains("poststop").then_some(())
    });
    check(("poststop", "stopped", None));
    assert_eq!(said("poststop"), of(daemon.to_string()));
    eventually("the bundle is gone", || (!bundle.exists()).then_some(()));
    container.remove().unwrap();
    let order = ground.read("order");
    assert_eq!(
        order.lines().filter(|line| *line == "poststop").count(),
        1,
        "{order}"
    );
}

#[test]
fn what_a_devices_hook_makes_in_the_root_is_what_the_container_sees() {
    let ground = Ground::new();
    let linker = ground.script(
        "linker",
        // As vendors' tools find the root: by the bundle's config.json.
        r#"bundle=$(sed 's/.*"bundle":"\([^"]*\)".*/\1/')
root=$(sed 's/.*"root":{[^}]*"path":"\([^"]*\)".*/\1/' $bundle/config.json)
cd $bundle && cd $root && ln -s busybox bin/linked && echo made > made"#,
    );
    ground.hooks(&[hook("createContainer", &linker)]);
    for handler in HANDLERS {
        let config = ground.node.pod_config("web");
        let pod = ground.node.try_run_by(handler, config).unwrap();
        let container = sleeper(&pod);
        container.start().unwrap();
        assert_eq!(
            container.exec(&["readlink", "/bin/linked"]).trim(),
            "busybox",
            "{handler}"
        );
        assert_eq!(
            container.exec(&["cat", "/made"]).trim(),
            "made",
            "{handler}"
        );
        assert_eq!(
            container.exec(&["stat", "-c", "%u:%g", "/made"]).trim(),
            "0:0",
            "{handler}"
        );
        assert_eq!(
            container.exec(&["sh", "-c", "echo $HOOKED"]).trim(),
            "1",
            "{handler}"
        );
        if handler == "crun" {
            // It makes the root read-only before it runs hooks.
            pod.remove();
            continue;
        }
        // A root that is read-only for the container is not for the hook.
        let mut config = hooked(&pod, &["sleep", "1000"]);
        config.security().readonly_rootfs = true;
        config.tty = true;
        let container = pod.start_as(config);
        assert_eq!(
            container.exec(&["cat", "/made"]).trim(),
            "made",
            "{handler}"
        );
        let answer = container.try_exec(&["touch", "/made"], 10).unwrap();
        assert_ne!(answer.exit_code, 0, "{handler}");
        pod.remove();
    }
}

#[test]
fn in_a_user_namespace_its_hooks_are_its_root_and_the_hosts_are_the_hosts() {
    let ground = Ground::new();
    let inside = ground.script(
        "inside",
        "cat config.json > $seen/config; id -u > $seen/inside; cat /proc/self/uid_map > $seen/map; \
            echo made > rootfs/made",
    );
    let outside = ground.script("outside", "cat /proc/self/uid_map > $seen/outside");
    ground.hooks(&[
        hook("createContainer", &inside),
        hook("createRuntime", &outside),
    ]);
    let mapping = vec![cri::IdMapping {
        host_id: 196_608,
        container_id: 0,
        length: 65_536,
    }];
    let mut config = ground.node.pod_config("web");
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(cri::UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: mapping.clone(),
        gids: mapping,
    });
    let pod = ground.node.run(config);
    let container = sleeper(&pod);
    container.start().unwrap();
    assert_eq!(
        container.exec(&["stat", "-c", "%u:%g", "/made"]).trim(),
        "0:0"
    );
    assert_eq!(ground.read("inside").trim(), "0");
    assert!(ground.read("map").contains("196608"));
    assert!(ground.read("outside").contains("4294967295"));
    assert!(ground.read("config").contains("\"ociVersion\""));
    // Nobody else may read what is in there: it has the environment.
    let bundle = ground.node.root().join("run/bundles").join(&container.id);
    let config = fs::metadata(bundle.join("config.json")).unwrap();
    assert_eq!(
        (config.mode() & 0o777, config.uid(), config.gid()),
        (0o640, 0, 196_608)
    );
    pod.remove();
}

#[test]
fn a_hook_that_fails_ends_the_start_and_is_told() {
    let ground = Ground::new();
    let fails = ground.script(
        "fails",
        "echo first >&2; echo the device is on fire >&2; exit 7",
    );
    let after = ground.script("after", "echo $1 >> $seen/after");
    let pod = ground.node.run_pod("web");
    for kind in [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
    ] {
        let failing = if kind == "startContainer" {
            let text = "echo the device is on fire >&2; exit 7";
            json!({"hookName": kind, "path": "/bin/sh", "args": ["sh", "-c", text]})
        } else {
            hook(kind, &fails)
        };
        let name = failing["path"].as_str().unwrap().to_owned();
        ground.hooks(&[failing, hook("poststart", &after), hook("poststop", &after)]);
        let container = sleeper(&pod);
        let error = container.start().expect_err("a hook fails");
        let said = format!("{kind} hook {name} failed with exit code 7: ");
        assert!(error.message().contains(&said), "{error}");
        assert!(error.message().contains("the device is on fire"), "{error}");
        let status = container.status();
        assert_eq!(
            (status.reason.as_str(), status.exit_code),
            ("StartError", 128),
            "{kind}"
        );
        assert!(
            status.message.contains("on fire"),
            "{kind}: {}",
            status.message
        );
        // The rest of its life is gone through: OCI runtime-spec, "Lifecycle".
        assert_eq!(ground.read("after"), "poststop\n", "{kind}");
        fs::remove_file(ground.seen().join("after")).unwrap();
        container.remove().unwrap();
    }
    ground.hooks(&[json!({"hookName": "createRuntime", "path": "/no/such/hook"})]);
    let container = sleeper(&pod);
    let error = container.start().expect_err("there is no such program");
    assert!(
        error
            .message()
            .contains("createRuntime hook /no/such/hook cannot be run: No such file"),
        "{error}"
    );
    container.remove().unwrap();

    ground.hooks(&[json!({"hookName": "poststop", "path": "/bin/true", "timeout": -3})]);
    let error = pod
        .try_create(hooked(&pod, &["true"]))
        .err()
        .expect("no such timeout");
    assert!(
        error.message().contains("poststop") && error.message().contains("-3"),
        "{error}"
    );
    pod.remove();
}

#[test]
fn what_fails_after_the_start_is_told_and_changes_nothing() {
    let ground = Ground::new();
    let fails = ground.script("fails", "echo $1 is on fire >&2; exit 9");
    let after = ground.script("after", "echo $1 >> $seen/after");
    let mut hooks = vec![];
    for kind in ["poststart", "poststop"] {
        hooks.extend([hook(kind, &fails), hook(kind, &after)]);
    }
    ground.hooks(&hooks);
    let pod = ground.node.run_pod("web");
    let container = sleeper(&pod);
    container.start().unwrap();
    let status = container.status();
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    assert!(
        status.message.contains("poststart is on fire"),
        "{}",
        status.message
    );
    assert_eq!(ground.read("after"), "poststart\n");
    container.stop(0).unwrap();
    let said = eventually("poststop is told", || {
        let message = container.status().message;
        message.contains("poststop is on fire").then_some(message)
    });
    assert!(said.contains("exit code 9"), "{said}");
    assert_eq!(container.status().exit_code, 137);
    eventually("the next one is run all the same", || {
        (ground.read("after") == "poststart\npoststop\n").then_some(())
    });
    pod.remove();
}

#[test]
fn a_hook_that_hangs_is_killed_with_all_its_processes_when_its_time_is_up() {
    let ground = Ground::new();
    let nap = nap(&ground.node);
    let hangs = ground.script(
        "hangs",
        &format!("echo here I hang >&2; sleep {nap} & sleep {nap}"),
    );
    let pod = ground.node.run_pod("web");
    for kind in ["createRuntime", "createContainer"] {
        let mut hanging = hook(kind, &hangs);
        hanging["timeout"] = json!(1);
        ground.hooks(&[hanging]);
        let container = sleeper(&pod);
        let begun = Instant::now();
        let error = container.start().expect_err("a hook hangs");
        assert!(begun.elapsed() >= Duration::from_secs(1));
        let said = "took longer than 1 s and was killed: here I hang";
        assert!(
            error.message().contains(kind) && error.message().contains(said),
            "{error}"
        );
        eventually_none(&nap);
        container.remove().unwrap();
    }
    pod.remove();
}

#[test]
fn a_hook_that_hangs_holds_its_own_start_alone_and_that_can_be_called_off() {
    let ground = Ground::new();
    let nap = nap(&ground.node);
    let hangs = ground.script(
        "hangs",
        &format!("sleep {nap} & echo > $seen/hangs; sleep {nap}"),
    );
    let after = ground.script("after", "echo >> $seen/after");
    let mark = ground.seen().join("hangs");
    for (handler, kind) in [
        ("", "createRuntime"),
        ("", "createContainer"),
        ("", "startContainer"),
        ("runc", "createRuntime"),
        ("runc", "createContainer"),
    ] {
        let what = format!("{handler} {kind}");
        let hanging = if kind == "startContainer" {
            let text = format!("echo > /seen/hangs; sleep {nap}");
            json!({"hookName": kind, "path": "/bin/sh", "args": ["sh", "-c", text]})
        } else {
            hook(kind, &hangs)
        };
        ground.hooks(&[hanging, hook("poststop", &after)]);
        let pod = ground
            .node
            .try_run_by(handler, ground.node.pod_config("web"))
            .unwrap();
        type Way = fn(&Container<'_>, &Pod<'_>);
        let ways: [(&str, Way); 3] = [
            ("stop", |container, _| container.stop(300).unwrap()),
            ("remove", |container, _| container.remove().unwrap()),
            ("stop the pod", |_, pod| pod.stop()),
        ];
        for (way, end) in ways {
            let mut config = hooked(&pod, &["sleep", "1000"]);
            config.mount(ground.seen(), "/seen");
            let container = pod.create(config);
            std::thread::scope(|scope| {
                let starting = scope.spawn(|| container.start());
                eventually("the hook hangs", || mark.exists().then_some(()));
                // Nothing else waits for it.
                assert_eq!(pod.output(&["echo", "runs"]), "runs\n", "{what}");
                assert_eq!(
                    ground
                        .node
                        .containers(None)
                        .iter()
                        .filter(|c| c.id == container.id)
                        .count(),
                    1
                );
                let begun = Instant::now();
                end(&container, &pod);
                assert!(
                    begun.elapsed() < Duration::from_secs(30),
                    "{what}: {way} took too long"
                );
                let error = starting.join().unwrap();
                assert!(error.is_err(), "{what}: {way}");
            });
            eventually_none(&nap);
            if way == "stop" {
                assert_eq!(container.state(), ContainerState::ContainerExited, "{what}");
                if handler.is_empty() {
                    let message = container.status().message;
                    assert_eq!(ground.read("after"), "\n", "{what}: {message}");
                }
            }
            fs::remove_file(&mark).unwrap();
            let _ = fs::remove_file(ground.seen().join("after"));
        }
        pod.remove();
        assert_eq!(
            fs::read_dir(ground.node.root().join("run/bundles"))
                .unwrap()
                .count(),
            0,
            "{what}"
        );
    }
}

#[test]
fn a_daemon_that_dies_with_a_hook_running_calls_the_start_off_when_it_comes_back() {
    let ground = Ground::new();
    let nap = nap(&ground.node);
    let hangs = ground.script("hangs", &format!("echo > $seen/hangs; sleep {nap}"));
    let after = ground.script("after", "echo >> $seen/after");
    for kind in ["createRuntime", "createContainer"] {
        ground.hooks(&[hook(kind, &hangs), hook("poststop", &after)]);
        let pod = ground.node.run_pod("web");
        let container = sleeper(&pod);
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| container.start());
            eventually("the hook hangs", || {
                ground.seen().join("hangs").exists().then_some(())
            });
            ground.node.kill_daemon();
            assert!(starting.join().unwrap().is_err());
        });
        ground.node.start_daemon();
        assert_eq!(container.status().reason, "StartError", "{kind}");
        eventually_none(&nap);
        eventually("poststop has been run", || {
            ground.seen().join("after").exists().then_some(())
        });
        assert!(pod.is_ready(), "{kind}");
        assert_eq!(pod.output(&["echo", "runs"]), "runs\n", "{kind}");
        container.remove().unwrap();
        pod.remove();
        fs::remove_file(ground.seen().join("hangs")).unwrap();
        fs::remove_file(ground.seen().join("after")).unwrap();
    }
}

#[test]
fn hooks_after_a_container_that_hang_do_not_keep_it() {
    let ground = Ground::new();
    let nap = nap(&ground.node);
    let hangs = ground.script("hangs", &format!("echo > $seen/$1; sleep {nap}"));
    // poststart ends with its container.
    ground.hooks(&[hook("poststart", &hangs)]);
    let pod = ground.node.run_pod("web");
    let container = sleeper(&pod);
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| container.start());
        eventually("the hook hangs", || {
            ground.seen().join("poststart").exists().then_some(())
        });
        assert_eq!(container.state(), ContainerState::ContainerRunning);
        container.stop(0).unwrap();
        container.remove().unwrap();
        let _ = starting.join().unwrap();
    });
    eventually_none(&nap);
    // poststop does not keep a pod that is to go.
    ground.hooks(&[hook("poststop", &hangs)]);
    let container = sleeper(&pod);
    container.start().unwrap();
    let begun = Instant::now();
    pod.remove();
    assert!(
        begun.elapsed() < Duration::from_secs(40),
        "removal took {:?}",
        begun.elapsed()
    );
    assert!(ground.seen().join("poststop").exists());
    eventually_none(&nap);
}

#[test]
fn hooks_get_no_descriptor_but_their_own_three() {
    let ground = Ground::new();
    let pod = ground.node.run_pod("web");
    for kind in [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
    ] {
        // It fails on purpose, so that what it lists is told.
        let (path, name) = match kind {
            "startContainer" => ("/bin/busybox", "ls"),
            _ => ("/bin/ls", "ls"),
        };
        let args = json!([name, "-l", "/proc/self/fd/", "/no/such"]);
        ground.hooks(&[json!({"hookName": kind, "path": path, "args": args})]);
        let container = sleeper(&pod);
        let error = container.start().expect_err("ls finds nothing there");
        let text = error.message();
        assert!(text.contains("/no/such"), "{kind}: {text}");
        let links: Vec<_> = text
            .lines()
            .filter_map(|line| line.split_once(" -> "))
            .collect();
        assert!(links.len() >= 3, "{kind}: {text}");
        for (link, target) in links {
            let number = link.rsplit([' ', '/']).next().unwrap();
            let fits = match number {
                "0" => target.contains("memfd:state"),
                "1" | "2" => target.starts_with("pipe:"),
                // The directory that is listed.
                "3" => target.starts_with("/proc/"),
                _ => false,
            };
            assert!(fits, "{kind}: {number} -> {target} in\n{text}");
        }
        container.remove().unwrap();
    }
    pod.remove();
}

#[test]
fn a_hook_of_the_containers_may_do_what_its_program_may() {
    let ground = Ground::new();
    let show = "grep -E '^(Uid|Gid|Cap|NoNew|Seccomp:)' /proc/self/status";
    let script = format!("{show} > /seen/hook");
    ground.hooks(&[
        json!({"hookName": "startContainer", "path": "/bin/sh", "args": ["sh", "-c", script],
        "env": ["PATH=/bin"]}),
    ]);
    let pod = ground.node.run_pod("web");
    for user in [0, 1000] {
        let script = format!("{show} > /seen/program; exec sleep 1000");
        let mut config = hooked(&pod, &["sh", "-c", &script]);
        config.mount(ground.seen(), "/seen");
        config.security().run_as_user = Some(cri::Int64Value { value: user });
        config.security().no_new_privs = user != 0;
        let container = pod.start_as(config);
        let program = eventually("the program has said so", || {
            let path = ground.seen().join("program");
            fs::read_to_string(path)
                .ok()
                .filter(|text| text.contains("Seccomp"))
        });
        assert_eq!(ground.read("hook"), program, "{user}");
        assert!(program.contains(&format!("Uid:\t{user}\t")), "{program}");
        container.remove().unwrap();
        for name in ["hook", "program"] {
            fs::remove_file(ground.seen().join(name)).unwrap();
        }
    }
    pod.remove();
}

#[test]
fn a_container_without_hooks_has_no_bundle() {
    let ground = Ground::new();
    let pod = ground.node.run_pod("web");
    let _container = pod.start(&["sleep", "1000"]);
    assert!(!ground.node.root().join("run/bundles").exists());
    pod.remove();
}

#[test]
fn a_crash_anywhere_leaves_no_bundle_and_no_hook_unrun() {
    let ground = Ground::new();
    let after = ground.script("after", "echo $1 >> $seen/after");
    let all = ["createRuntime", "createContainer", "poststart", "poststop"];
    ground.hooks(&all.map(|kind| hook(kind, &after)));
    fs::write(ground.seen().join("after"), "").unwrap();
    fs::set_permissions(
        ground.seen().join("after"),
        fs::Permissions::from_mode(0o666),
    )
    .unwrap();
    let node = &ground.node;
    for point in points(
        node,
        &["start_container.", "poststop.", "remove_container."],
    ) {
        println!("crash at {point}");
        let pod = node.run_pod("web");
        let container = sleeper(&pod);
        node.start_daemon_to_crash_at(Some(&point));
        let _ = container.start();
        let _ = container.stop(0);
        let _ = container.remove();
        node.wait_for_crash();
        node.start_daemon();
        match container.try_status() {
            Ok(_) => container.remove().unwrap(),
            Err(status) => assert_eq!(status.code(), tonic::Code::NotFound, "{status}"),
        }
        pod.remove();
        // Never made where it died before.
        let bundles = fs::read_dir(node.root().join("run/bundles"));
        let bundles = bundles.map_or(0, Iterator::count);
        assert_eq!(bundles, 0, "crash at {point}");
        let run = ground.read("after");
        // One that never came to be started has nothing to end.
        if run.contains("createRuntime") {
            assert!(run.contains("poststop"), "crash at {point}: {run}");
        }
        fs::write(ground.seen().join("after"), "").unwrap();
    }
    assert_eq!(node.leftovers(), [""; 0]);
}
