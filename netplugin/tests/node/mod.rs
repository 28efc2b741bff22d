//! A node with a network of its own: configuration directory, plugin
//! directories, state, and the host of [`World`].
#![allow(dead_code, reason = "each test binary uses its part")]

use crate::world::{Netns, World};
use berth_netplugin::{
    AttachRequest, AttachResult, Collected, DetachRequest, Mode, Network, NetworkError,
    NetworkSettings, Pod, PortMapping,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub const DEBIAN_PLUGINS: &str = "/usr/lib/cni";

pub struct Node {
    pub world: World,
    pub network: Network,
    settings: NetworkSettings,
}

/// What a pod wants of its network.
#[derive(Clone, Default)]
pub struct Wishes {
    pub ports: Vec<PortMapping>,
    pub annotations: BTreeMap<String, String>,
}

impl Wishes {
    pub fn annotated(pairs: &[(&str, &str)]) -> Self {
        let pairs = pairs
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()));
        Self {
            ports: Vec::new(),
            annotations: pairs.collect(),
        }
    }
}

impl Node {
    pub fn new(mode: Mode) -> Self {
        Self::with(|settings| settings.mode = mode)
    }

    /// One that waits for a configuration and is otherwise as `change` says.
    pub fn with(change: impl FnOnce(&mut NetworkSettings)) -> Self {
        let world = World::new();
        let dir = world.dir.path();
        for sub in ["conf", "bin"] {
            std::fs::create_dir(dir.join(sub)).unwrap();
        }
        let mut settings = NetworkSettings::new(dir.join("conf"), dir.join("network"));
        settings.mode = Mode::Wait;
        settings.cni_bin_dirs = vec![dir.join("bin"), DEBIAN_PLUGINS.into()];
        settings.plugin_deadline = Duration::from_secs(5);
        settings.bridge = world.settings();
        change(&mut settings);
        let network = Network::open(settings.clone()).unwrap();
        Self {
            world,
            network,
            settings,
        }
    }

    /// A daemon that comes up on what the last one left.
    pub fn restart(&mut self) {
        self.restart_with(|_| ());
    }

    /// The same with other settings.
    pub fn restart_with(&mut self, change: impl FnOnce(&mut NetworkSettings)) {
        change(&mut self.settings);
        self.network = Network::open(self.settings.clone()).unwrap();
    }

    pub fn dir(&self) -> &Path {
        self.world.dir.path()
    }

    pub fn conf(&self, file: &str) -> PathBuf {
        self.dir().join("conf").join(file)
    }

    pub fn configure(&self, file: &str, config: Value) {
        std::fs::write(self.conf(file), config.to_string()).unwrap();
    }

    /// The one configuration: these plugins in this version.
    pub fn plugins(&self, version: &str, plugins: &[Value]) {
        let list = json!({ "cniVersion": version, "name": "test", "plugins": plugins });
        self.configure("10.conflist", list);
    }

    /// A plugin of the test's own.
    pub fn plugin(&self, name: &str, script: &str) {
        let path = self.dir().join("bin").join(name);
        // Renamed into place: one that is being run cannot be written to.
        let new = path.with_extension("new");
        std::fs::write(&new, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(new, path).unwrap();
    }

    /// One that speaks 1.1, gives an address, notes each call in `log` and then
    /// does what `script` says.
    pub fn modern_plugin(&self, name: &str, script: &str) {
        let log = self.dir().join("log");
        let script = format!(
            "input=$(cat)
             echo \"$CNI_COMMAND|{name}|$CNI_CONTAINERID|$CNI_NETNS|$input\" >> {}
             [ $CNI_COMMAND = VERSION ] && echo '{{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.4.0\",\"1.0.0\",\"1.1.0\"]}}' && exit 0
             {script}
             [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.1.0\",\"ips\":[{{\"address\":\"10.5.0.2/24\"}}]}}'
             exit 0",
            log.display()
        );
        self.plugin(name, &script);
    }

    /// What [`Self::modern_plugin`]s were called with since the last look:
    /// command, plugin, container, namespace, configuration.
    pub fn calls(&self) -> Vec<[String; 5]> {
        let log = self.dir().join("log");
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let _ = std::fs::remove_file(log);
        let lines = text.lines().map(|line| {
            let parts: Vec<String> = line.splitn(5, '|').map(str::to_owned).collect();
            parts.try_into().unwrap()
        });
        lines.collect()
    }

    pub fn attach(&self, id: &str, netns: &Netns) -> Result<AttachResult, NetworkError> {
        self.attach_with(id, netns, &Wishes::default())
    }

    pub fn attach_with(
        &self,
        id: &str,
        netns: &Netns,
        wishes: &Wishes,
    ) -> Result<AttachResult, NetworkError> {
        let netns = netns.path();
        let request = AttachRequest {
            pod: pod(id),
            netns: &netns,
            port_mappings: &wishes.ports,
            annotations: &wishes.annotations,
            cgroup_parent: "",
            dns: None,
            handler: "",
        };
        self.world.host.run(|| self.network.attach(&request))
    }

    pub fn detach(
        &self,
        id: &str,
        netns: Option<&Netns>,
        record: Option<&Value>,
    ) -> Result<(), NetworkError> {
        let path = netns.map(Netns::path);
        let request = DetachRequest {
            pod: pod(id),
            netns: path.as_deref(),
        };
        self.world
            .host
            .run(|| self.network.detach(&request, record))
    }

    /// GC with these pods alive.
    pub fn gc(&self, live: &[&str]) -> Collected {
        self.world
            .host
            .run(|| self.network.gc(&|id| live.contains(&id)))
    }

    /// "" when ready, else reason and message.
    pub fn reason(&self) -> String {
        let status = self.world.host.run(|| self.network.status());
        assert_eq!(status.ready, status.reason.is_empty());
        match status.ready {
            true => String::new(),
            false => format!("{}: {}", status.reason, status.message),
        }
    }
}

pub fn pod(id: &str) -> Pod<'_> {
    Pod {
        id,
        name: "web",
        namespace: "default",
        uid: "u-1",
    }
}

pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

pub fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "it did not happen within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}
