//! `Network` with plugins that hang, crash, babble, lie and go: none of them may
//! hold the node or leak what it was given. Needs root.

mod node;
mod world;

use berth_netplugin::{Mode, NetworkError};
use node::{Node, chain};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};
use world::Netns;

/// Attaches with a plugin `bad` that does this at ADD; what was said. DEL must
/// have been run after it, and nothing may be left.
fn fail(node: &Node, script: &str) -> String {
    let marks = node.dir().join("marks");
    let _ = std::fs::remove_file(&marks);
    let script = format!(
        "[ $CNI_COMMAND = VERSION ] && exit 0
         [ $CNI_COMMAND = DEL ] && echo gone >> {} && exit 0\n{script}",
        marks.display()
    );
    node.plugin("bad", &script);
    let error = node.attach("a", &Netns::new()).unwrap_err();
    let gone = std::fs::read_to_string(&marks);
    assert_eq!(gone.unwrap(), "gone\n", "DEL after a failed ADD: {error}");
    assert_eq!(node.world.leftovers(), Vec::<String>::new());
    chain(&error)
}

#[test]
fn what_is_wrong_with_a_plugin_is_said() {
    let node = Node::new(Mode::Wait);
    node.plugins("1.0.0", &[json!({ "type": "bad" })]);
    let said = fail(&node, "echo garbage; echo why >&2; exit 7");
    assert!(
        said.contains("exit status: 7 and no CNI error: \"garbage\\nwhy\""),
        "{said}"
    );
    for (script, expected) in [
        ("kill -9 $$", "signal: 9"),
        ("kill -SEGV $$", "signal: 11"),
        ("echo not json", "what is not JSON"),
        ("exit 0", "what is not JSON"),
        ("echo '{\"ips\": 7}'", "what is no result"),
        ("echo '[]'", "what is no result"),
        (
            "echo '{\"cniVersion\":\"9.0.0\"}'",
            "cniVersion is \"9.0.0\"",
        ),
        ("echo '{\"code\":7,\"msg\":\"no\"}'", "an error, code 7"),
        (
            "head -c 104857600 /dev/zero",
            "wrote more than 1048576 bytes",
        ),
        (
            "head -c 104857600 /dev/zero >&2",
            "wrote more than 1048576 bytes",
        ),
        ("yes '{'", "wrote more than 1048576 bytes"),
    ] {
        let said = fail(&node, script);
        assert!(said.contains(expected), "{script}: {said}");
    }
}

#[test]
fn each_error_code_is_shown_with_message_and_details() {
    let node = Node::new(Mode::Wait);
    node.plugins("1.0.0", &[json!({ "type": "bad" })]);
    for code in [1, 2, 3, 4, 5, 6, 7, 11, 50, 51, 99, 100, 999, u32::MAX] {
        let script = format!(
            r#"echo '{{"cniVersion":"1.0.0","code":{code},"msg":"no luck","details":"at all"}}'; exit 1"#
        );
        assert_eq!(
            fail(&node, &script),
            format!("CNI plugin bad failed ADD: no luck (code {code}): at all")
        );
    }
    let bare = r#"echo '{"code":11,"msg":"later"}'; exit 1"#;
    assert_eq!(
        fail(&node, bare),
        "CNI plugin bad failed ADD: later (code 11)"
    );
}

#[test]
fn a_plugin_that_hangs_is_killed_with_all_it_started() {
    let node = Node::with(|settings| settings.plugin_deadline = Duration::from_secs(1));
    node.plugins("1.0.0", &[json!({ "type": "bad" })]);
    let started = Instant::now();
    let pid = node.dir().join("pid");
    let script = format!("sleep 1000 & echo $! > {}; sleep 1000", pid.display());
    assert!(fail(&node, &script).contains("did not end within 1s"));
    let script = format!(
        "trap '' TERM; (trap '' TERM; sleep 1000 & wait) & echo $! > {}; wait",
        pid.display()
    );
    assert!(fail(&node, &script).contains("did not end within 1s"));
    // One that ends and leaves something that holds its output open.
    let script = format!("sleep 1000 & echo $! > {}; echo '{{}}'", pid.display());
    fail(&node, &script);
    assert!(started.elapsed() < Duration::from_secs(20));
    let pid = std::fs::read_to_string(pid).unwrap();
    node::wait_until(|| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        stat.is_err() || stat.is_ok_and(|stat| stat.contains(") Z "))
    });
}

#[test]
fn a_plugin_that_cannot_be_run_is_told_from_one_that_is_not_there() {
    let node = Node::new(Mode::Wait);
    node.plugins("1.0.0", &[json!({ "type": "bad" })]);
    assert!(
        node.reason()
            .starts_with("CNIPluginMissing: CNI plugin bad is not in ")
    );
    let path = node.dir().join("bin/bad");
    // Copied, but not yet made executable.
    std::fs::write(&path, "#!/bin/sh\n").unwrap();
    assert!(node.reason().starts_with("CNIPluginMissing"));
    let error = node.attach("a", &Netns::new()).unwrap_err();
    assert!(matches!(error, NetworkError::NotReady { .. }), "{error}");
    node.plugin("bad", "exit 0");
    assert_eq!(node.reason(), "");
    // Copied halfway: a program that is none.
    std::fs::write(&path, [0x7f, b'E', b'L', b'F', 0, 0]).unwrap();
    let said = chain(&node.attach("a", &Netns::new()).unwrap_err());
    assert!(
        said.contains("CNI plugin bad failed ADD") && said.contains("cannot start"),
        "{said}"
    );
    // DEL could not be run either.
    assert_eq!(node.world.leftovers(), ["a"]);
    node.plugin("bad", "exit 0");
    assert_eq!(node.gc(&[]).freed, ["a"]);
}

#[test]
fn a_del_that_fails_for_ever_holds_nothing_but_its_record() {
    let mut node = Node::new(Mode::Wait);
    node.modern_plugin(
        "bad",
        "[ $CNI_COMMAND = DEL ] && echo '{\"code\":100,\"msg\":\"never\"}' && exit 1",
    );
    node.plugins("1.0.0", &[json!({ "type": "bad" })]);
    let netns = Netns::new();
    let attached = node.attach("a", &netns).unwrap();
    for _ in 0..3 {
        let error = node
            .detach("a", Some(&netns), Some(&attached.record))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "CNI plugin bad failed DEL: never (code 100)"
        );
        let error = node.world.host.run(|| node.network.retry("a")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "CNI plugin bad failed DEL: never (code 100)"
        );
        node.restart();
    }
    let collected = node.gc(&[]);
    assert_eq!(collected.failed.len(), 1);
    assert_eq!(collected.failed[0].0, "a");
    assert_eq!(node.world.leftovers(), ["a"], "the record stays");
    node.calls();
    // Alive, it is nobody's business; dead and willing, it goes.
    node.modern_plugin("bad", "");
    assert_eq!(node.gc(&["a"]).freed, Vec::<String>::new());
    assert_eq!(node.gc(&[]).freed, ["a"]);
    assert_eq!(node.world.leftovers(), Vec::<String>::new());
    let calls = node.calls();
    let del = calls.iter().find(|call| call[0] == "DEL").unwrap();
    let config: Value = serde_json::from_str(&del[4]).unwrap();
    assert_eq!(
        config["prevResult"]["ips"][0]["address"], "10.5.0.2/24",
        "as at ADD"
    );
    assert_eq!(del[3], netns.path().to_str().unwrap(), "while it is there");
}

#[test]
fn a_plugin_that_goes_between_add_and_del_is_waited_for() {
    let node = Node::new(Mode::Wait);
    node.modern_plugin("bad", "");
    node.plugins("1.0.0", &[json!({ "type": "bad" })]);
    let netns = Netns::new();
    let attached = node.attach("a", &netns).unwrap();
    std::fs::remove_file(node.dir().join("bin/bad")).unwrap();
    drop(netns);
    let error = node.detach("a", None, Some(&attached.record)).unwrap_err();
    assert!(
        error.to_string().starts_with("CNI plugin bad is not in "),
        "{error}"
    );
    assert_eq!(node.gc(&[]).failed.len(), 1);
    node.modern_plugin("bad", "");
    node.calls();
    node.world.host.run(|| node.network.retry("a")).unwrap();
    assert_eq!(
        node.calls()[0][..4],
        ["DEL", "bad", "a", ""],
        "without the namespace"
    );
    assert_eq!(node.world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_record_that_was_lost_is_made_again_from_the_pods() {
    let node = Node::new(Mode::Wait);
    node.modern_plugin("bad", "[ $CNI_COMMAND = DEL ] && exit 1");
    node.plugins("1.0.0", &[json!({ "type": "bad" })]);
    let record = node.attach("a", &Netns::new()).unwrap().record;
    let file = node.dir().join("network/attachments/a");
    let whole = std::fs::read(&file).unwrap();
    for lost in [true, false] {
        match lost {
            true => std::fs::remove_file(&file).unwrap(),
            false => std::fs::write(&file, &whole[..whole.len() / 2]).unwrap(),
        }
        node.detach("a", None, Some(&record)).unwrap_err();
    }
    // Damaged, and nobody knows better: it is named and stays.
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let error = node.detach("a", None, None).unwrap_err();
    assert!(error.to_string().contains("attachment of pod a"), "{error}");
    node.modern_plugin("bad", "");
    node.detach("a", None, Some(&record)).unwrap();
    assert_eq!(node.world.leftovers(), Vec::<String>::new());
}

#[test]
fn who_does_not_know_the_container_has_nothing_to_give_back() {
    let node = Node::new(Mode::Wait);
    node.modern_plugin(
        "bad",
        "[ $CNI_COMMAND = DEL ] && echo '{\"code\":3,\"msg\":\"who?\"}' && exit 1",
    );
    node.plugins("1.0.0", &[json!({ "type": "bad" })]);
    node.attach("a", &Netns::new()).unwrap();
    node.detach("a", None, None).unwrap();
    assert_eq!(node.world.leftovers(), Vec::<String>::new());
}

#[test]
fn status_is_asked_anew_and_does_not_wait_for_a_plugin_that_hangs() {
    let node = Node::with(|settings| settings.plugin_deadline = Duration::from_secs(3));
    let say = node.dir().join("say");
    let script = format!("[ $CNI_COMMAND = STATUS ] && . {}", say.display());
    node.modern_plugin("new", &script);
    node.plugins("1.1.0", &[json!({ "type": "new" })]);
    let says = |text: &str| std::fs::write(&say, text).unwrap();
    let fails = |code: u32| {
        says(&format!(
            "echo '{{\"code\":{code},\"msg\":\"no routes\",\"details\":\"yet\"}}'; exit 1"
        ));
    };
    says("");
    assert_eq!(node.reason(), "");
    fails(50);
    assert_eq!(
        node.reason(),
        "CNIPluginNotReady: CNI plugin new failed STATUS: no routes (code 50): yet"
    );
    fails(51);
    assert!(node.reason().starts_with("CNIPluginLimited: "));
    says("");
    assert_eq!(node.reason(), "");
    says("sleep 1000");
    let started = Instant::now();
    // What was said last counts until the deadline has passed.
    assert_eq!(node.reason(), "");
    assert!(started.elapsed() < Duration::from_secs(4));
    node::wait_until(|| node.reason().contains("did not end within"));
    says("");
    node::wait_until(|| node.reason().is_empty());
    // One that never said anything is not ready.
    node.modern_plugin("newer", "[ $CNI_COMMAND = STATUS ] && sleep 1000");
    node.plugins("1.1.0", &[json!({ "type": "newer" })]);
    assert!(node.reason().starts_with("CNIPluginSilent: "));
    // Before 1.1 nobody is asked.
    node.plugins("1.0.0", &[json!({ "type": "newer" })]);
    node::wait_until(|| node.reason().is_empty());
}

#[test]
fn gc_tells_the_plugins_who_is_there() {
    let node = Node::new(Mode::Wait);
    node.modern_plugin("new", "");
    let plugins = |more: Value| {
        let mut list =
            json!({ "cniVersion": "1.1.0", "name": "test", "plugins": [{ "type": "new" }] });
        list.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        node.configure("10.conflist", list);
    };
    plugins(json!({}));
    let pods = ["a", "b", "c"].map(|id| (id, Netns::new()));
    for (id, netns) in &pods {
        node.attach(id, netns).unwrap();
    }
    node.calls();
    let collected = node.gc(&["a", "c", "not-attached"]);
    assert_eq!(collected.freed, ["b"]);
    collected.rest.unwrap();
    let calls = node.calls();
    let commands: Vec<&str> = calls.iter().map(|call| &*call[0]).collect();
    assert_eq!(
        commands,
        ["DEL", "GC"],
        "what has no GC is freed by our records"
    );
    let config: Value = serde_json::from_str(&calls[1][4]).unwrap();
    assert_eq!(
        config["cni.dev/valid-attachments"],
        json!([{ "containerID": "a", "ifname": "eth0" }, { "containerID": "c", "ifname": "eth0" }])
    );

    plugins(json!({ "disableGC": true }));
    // The pods are attached to what was configured then: only the file says no.
    for id in ["a", "c"] {
        node.detach(id, None, None).unwrap();
    }
    node.calls();
    node.gc(&[]).rest.unwrap();
    assert!(node.calls().is_empty());
    plugins(json!({}));
    node.modern_plugin(
        "new",
        "[ $CNI_COMMAND = GC ] && echo '{\"code\":100,\"msg\":\"no\"}' && exit 1",
    );
    let said = node.gc(&[]).rest.unwrap_err().to_string();
    assert_eq!(said, "CNI plugin new failed GC: no (code 100)");
}

#[test]
fn nothing_else_runs_while_gc_does_and_gc_waits_for_what_runs() {
    let node = Node::new(Mode::Wait);
    let gate = node.dir().join("gate");
    std::fs::create_dir(&gate).unwrap();
    // Each call is noted with what else was going on when it began.
    let script = format!(
        "mkdir {0}/$CNI_COMMAND-$$; ls {0} | tr '\\n' ' ' >> {1}; echo >> {1}; sleep 0.05; rmdir {0}/$CNI_COMMAND-$$",
        gate.display(),
        node.dir().join("seen").display()
    );
    node.modern_plugin("new", &script);
    node.plugins("1.1.0", &[json!({ "type": "new" })]);
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let node = &node;
            scope.spawn(move || {
                for round in 0..4 {
                    let id = format!("pod{worker}-{round}");
                    node.attach(&id, &Netns::new()).unwrap();
                    node.detach(&id, None, None).unwrap();
                }
            });
        }
        let node = &node;
        scope.spawn(move || {
            for _ in 0..5 {
                node.world
                    .host
                    .run(|| node.network.gc(&|_| true))
                    .rest
                    .unwrap();
            }
        });
    });
    let seen = std::fs::read_to_string(node.dir().join("seen")).unwrap();
    assert!(seen.contains("GC"), "{seen}");
    for line in seen.lines().filter(|line| line.contains("GC")) {
        assert_eq!(line.split_whitespace().count(), 1, "beside GC: {line}");
    }
    assert!(
        seen.lines().any(|line| line.split_whitespace().count() > 1),
        "pods do not wait for each other"
    );
}

#[test]
fn many_dead_attachments_of_a_plugin_that_hangs_take_no_longer_than_a_few() {
    let node = Node::with(|settings| settings.plugin_deadline = Duration::from_secs(1));
    node.modern_plugin("bad", "[ $CNI_COMMAND = DEL ] && sleep 1000");
    node.plugins("1.0.0", &[json!({ "type": "bad" })]);
    for number in 0..8 {
        node.attach(&format!("pod{number}"), &Netns::new()).unwrap();
    }
    let started = Instant::now();
    assert_eq!(node.gc(&[]).failed.len(), 8);
    assert!(
        started.elapsed() < Duration::from_secs(6),
        "{:?}",
        started.elapsed()
    );
    node.modern_plugin("bad", "");
    assert_eq!(node.gc(&[]).freed.len(), 8);
}

#[test]
fn what_an_earlier_daemon_recorded_is_understood() {
    let node = Node::new(Mode::Wait);
    node.modern_plugin("old", "");
    // As version 0.1.0 wrote it.
    let payload = json!({ "id": "a", "args": "IgnoreUnknown=1", "capabilities": {}, "result": null,
        "list": { "version": "1.0.0", "name": "test", "plugins": [{ "type": "old" }] } })
    .to_string();
    let crc = crc32(payload.as_bytes());
    let text = format!(
        "berth-record 1 attachment 1 {} {crc:08x}\n{payload}",
        payload.len()
    );
    let file = node.dir().join("network/attachments/a");
    std::fs::write(&file, text).unwrap();
    node.detach("a", None, None).unwrap();
    assert!(!Path::new(&file).exists());
    assert_eq!(node.calls().last().unwrap()[0], "DEL");
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
