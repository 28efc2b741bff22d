//! Which configuration counts, what plugins are told by it, and what the status
//! says of it. Needs root.

mod node;
mod world;

use berth_netplugin::{Mode, NetworkError, PortMapping, Protocol};
use node::{Node, Wishes};
use serde_json::{Value, json};
use std::fs;
use std::time::{Duration, SystemTime};
use world::Netns;

fn single(name: &str, kind: &str) -> Value {
    json!({ "cniVersion": "1.0.0", "name": name, "type": kind })
}

#[test]
fn plugins_are_told_what_they_should_be() {
    let node = Node::new(Mode::Wait);
    let log = node.dir().join("log");
    let script = |address: &str| {
        format!(
            "input=$(cat)
             [ $CNI_COMMAND = VERSION ] && exit 0
             echo \"$CNI_COMMAND|$CNI_CONTAINERID|$CNI_NETNS|$CNI_IFNAME|$CNI_ARGS|$input\" >> {}
             [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.1.0\",\"ips\":[{{\"address\":\"{address}\"}}]}}'
             exit 0",
            log.display()
        )
    };
    node.plugin("one", &script("10.5.0.2/24"));
    node.plugin("two", &script("10.5.0.3/24"));
    let config = json!({ "cniVersion": "0.4.0", "cniVersions": ["1.1.0"], "name": "test",
        "plugins": [{ "type": "one", "capabilities": { "portMappings": true, "mac": true } },
                    { "type": "two", "own": "word" }] });
    node.configure("10.conflist", config);
    let netns = Netns::new();
    let wishes = Wishes {
        ports: vec![PortMapping {
            host_port: 53,
            container_port: 5353,
            protocol: Protocol::Udp,
            host_ip: Some("127.0.0.1".parse().unwrap()),
        }],
        ..Wishes::default()
    };
    let attached = node.attach_with("id1", &netns, &wishes).unwrap();
    assert_eq!(
        attached.ips,
        ["10.5.0.3".parse::<std::net::IpAddr>().unwrap()],
        "the last result"
    );
    node.detach("id1", Some(&netns), None).unwrap();

    let lines = fs::read_to_string(&log).unwrap();
    let lines: Vec<Vec<&str>> = lines
        .lines()
        .map(|line| line.splitn(6, '|').collect())
        .collect();
    let commands: Vec<&str> = lines.iter().map(|line| line[0]).collect();
    assert_eq!(commands, ["ADD", "ADD", "DEL", "DEL"]);
    let input = |at: usize| serde_json::from_str::<Value>(lines[at][5]).unwrap();
    assert_eq!(
        lines[0][1..4],
        ["id1", netns.path().to_str().unwrap(), "eth0"]
    );
    assert_eq!(
        lines[0][4],
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;\
         K8S_POD_INFRA_CONTAINER_ID=id1;K8S_POD_UID=u-1"
    );
    assert_eq!(
        input(0),
        json!({ "cniVersion": "1.1.0", "name": "test", "type": "one", "runtimeConfig": {
            "portMappings": [{ "hostPort": 53, "containerPort": 5353, "protocol": "udp",
                               "hostIP": "127.0.0.1" }] } })
    );
    assert_eq!(input(1)["prevResult"]["ips"][0]["address"], "10.5.0.2/24");
    assert_eq!(input(1)["own"], "word");
    assert_eq!(input(2)["type"], "two", "DEL goes backwards");
    assert_eq!(input(2)["prevResult"]["ips"][0]["address"], "10.5.0.3/24");
    assert_eq!(input(3)["prevResult"]["ips"][0]["address"], "10.5.0.3/24");
    assert!(
        input(3)["runtimeConfig"]["portMappings"].is_array(),
        "as at ADD"
    );
}

#[test]
fn a_wrong_annotation_fails_the_pod_before_any_plugin_runs() {
    let node = Node::new(Mode::Wait);
    node.modern_plugin("new", "");
    node.configure("10.conf", single("n", "new"));
    let wishes = Wishes::annotated(&[("kubernetes.io/ingress-bandwidth", "fast")]);
    let error = node.attach_with("a", &Netns::new(), &wishes).unwrap_err();
    assert!(matches!(error, NetworkError::Annotation(_)), "{error}");
    assert!(node.calls().is_empty());
}

#[test]
fn status_says_which_file_and_what_is_wrong() {
    let node = Node::new(Mode::Wait);
    fs::write(node.conf("10-half.conflist"), r#"{"cniVersion":"#).unwrap();
    let said = node.reason();
    assert!(
        said.starts_with("CNIConfigInvalid: ") && said.contains("10-half.conflist"),
        "{said}"
    );
    // It may be being written: what comes after it does not count yet.
    node.configure("20-next.conflist", single("n", "nowhere"));
    assert!(node.reason().starts_with("CNIConfigInvalid: "));
    let half = fs::File::options()
        .write(true)
        .open(node.conf("10-half.conflist"))
        .unwrap();
    half.set_modified(SystemTime::now() - Duration::from_secs(60))
        .unwrap();
    let said = node.reason();
    assert!(
        said.starts_with("CNIPluginMissing: CNI plugin nowhere is not in "),
        "{said}"
    );
    node.plugin("nowhere", "exit 0");
    assert_eq!(node.reason(), "");
    let info = node.network.info();
    assert_eq!(info["default"]["network"]["name"], "n");
    assert!(
        info["default"]["problems"][0]
            .as_str()
            .unwrap()
            .contains("10-half.conflist")
    );
}

#[test]
fn ready_turns_with_the_directory_whatever_becomes_of_it() {
    let node = Node::new(Mode::Wait);
    let (conf, other) = (node.dir().join("conf"), node.dir().join("other"));
    let absent = || {
        assert!(
            node.reason()
                .starts_with("NetworkPluginNotReady: no CNI configuration in ")
        )
    };
    let write = || node.configure("99.conf", single("n", "loopback"));
    absent();
    write();
    assert_eq!(node.reason(), "");
    fs::remove_dir_all(&conf).unwrap();
    absent();
    fs::create_dir(&conf).unwrap();
    absent();
    write();
    assert_eq!(node.reason(), "");
    fs::rename(&conf, &other).unwrap();
    absent();
    std::os::unix::fs::symlink(&other, &conf).unwrap();
    assert_eq!(node.reason(), "");
    fs::remove_file(&conf).unwrap();
    std::os::unix::fs::symlink(node.dir().join("nowhere"), &conf).unwrap();
    absent();
    fs::remove_file(&conf).unwrap();
    fs::write(&conf, "").unwrap();
    assert!(
        node.reason().starts_with("CNIConfigInvalid: "),
        "a file in its place"
    );
    fs::remove_file(&conf).unwrap();
    fs::create_dir(&conf).unwrap();
    // Byte by byte.
    let text = single("n", "loopback").to_string();
    for end in 0..text.len() {
        fs::write(node.conf("99.conf"), &text[..end]).unwrap();
        assert!(node.reason().starts_with("CNIConfigInvalid: "), "{end}");
    }
    fs::write(node.conf("99.conf"), &text).unwrap();
    assert_eq!(node.reason(), "");
}

#[test]
fn the_built_in_network_does_not_step_in_for_a_file_that_is_wrong() {
    let node = Node::new(Mode::Builtin);
    assert_eq!(node.reason(), "");
    fs::write(node.conf("10.conflist"), "{").unwrap();
    assert!(node.reason().starts_with("CNIConfigInvalid: "));
    node.attach("a", &Netns::new()).unwrap_err();
    assert_eq!(node.world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_network_may_be_chosen_by_name() {
    let node = Node::with(|settings| settings.cni_network = Some("second".into()));
    node.plugin("one", "exit 0");
    node.configure("10.conf", single("first", "one"));
    assert!(
        node.reason().ends_with("; there is first"),
        "{}",
        node.reason()
    );
    node.configure("20.conf", single("second", "one"));
    assert_eq!(node.reason(), "");
    assert_eq!(node.network.info()["default"]["network"]["name"], "second");
}

#[test]
fn handlers_may_have_networks_of_their_own() {
    let node = Node::with(|settings| {
        let dir = settings.cni_conf_dir.with_file_name("kata");
        settings.mode = Mode::Builtin;
        settings.handler_conf_dirs.insert("kata".into(), dir);
    });
    let error = node.network.configured("kata").unwrap_err();
    assert!(error.to_string().contains("kata"), "{error}");
    node.network.configured("").unwrap();
    node.network.configured("other").unwrap();
    node.modern_plugin("new", "");
    fs::create_dir(node.dir().join("kata")).unwrap();
    fs::write(
        node.dir().join("kata/1.conf"),
        single("k", "new").to_string(),
    )
    .unwrap();
    node.network.configured("kata").unwrap();
    let netns = Netns::new();
    let path = netns.path();
    let annotations = Default::default();
    let request = berth_netplugin::AttachRequest {
        pod: node::pod("a"),
        netns: &path,
        port_mappings: &[],
        annotations: &annotations,
        cgroup_parent: "",
        dns: None,
        handler: "kata",
    };
    let attached = node
        .world
        .host
        .run(|| node.network.attach(&request))
        .unwrap();
    assert_eq!(attached.record["list"]["name"], "k");
    node.detach("a", Some(&netns), None).unwrap();
}

#[test]
fn a_template_becomes_the_configuration_once_the_pod_network_is_known() {
    let template =
        r#"{"cniVersion":"1.0.0","name":"t","plugins":[{"type":"one","subnet":"{{.PodCIDR}}"}]}"#;
    let mut node = Node::with(|settings| {
        let path = settings.cni_conf_dir.with_file_name("template");
        fs::write(&path, template).unwrap();
        settings.mode = Mode::Builtin;
        settings.cni_template = Some(path);
    });
    node.plugin("one", "exit 0");
    let subnets = |text: &str| vec![text.parse().unwrap()];
    let subnet = |node: &Node| {
        let text = fs::read_to_string(node.conf("10-berth.conflist")).unwrap();
        let list: Value = serde_json::from_str(&text).unwrap();
        list["plugins"][0]["subnet"].as_str().unwrap().to_owned()
    };
    assert!(
        node.reason().starts_with("PodCIDRUnknown: "),
        "not the built-in one meanwhile"
    );
    node.network.set_pod_cidr(&subnets("10.1.0.0/24")).unwrap();
    assert_eq!(
        (node.reason(), subnet(&node)),
        (String::new(), "10.1.0.0/24".into())
    );
    node.network.set_pod_cidr(&subnets("10.2.0.0/24")).unwrap();
    assert_eq!(subnet(&node), "10.2.0.0/24");
    // It comes back by itself, also with a daemon that was never told.
    fs::remove_dir_all(node.dir().join("conf")).unwrap();
    node.restart();
    assert_eq!(
        (node.reason(), subnet(&node)),
        (String::new(), "10.2.0.0/24".into())
    );
    // Somebody else's configuration is left alone, and its absence mended.
    fs::remove_file(node.conf("10-berth.conflist")).unwrap();
    node.configure("50.conf", single("n", "one"));
    node.network.set_pod_cidr(&subnets("10.3.0.0/24")).unwrap();
    assert!(!node.conf("10-berth.conflist").exists());
    fs::remove_file(node.conf("50.conf")).unwrap();
    fs::write(node.dir().join("template"), "{{.NodeName}}").unwrap();
    let said = node.reason();
    assert!(
        said.starts_with("CNITemplateInvalid: ") && said.contains("line 1: there is no .NodeName"),
        "{said}"
    );
    node.network
        .set_pod_cidr(&subnets("10.4.0.0/24"))
        .unwrap_err();
}
