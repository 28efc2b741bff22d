//! The pod network as the rest of Berth sees it.
//!
//! What the built-in network gave is known by its leases. What CNI plugins gave
//! is recorded before they are run and after ([`crate::attached`]). What is
//! configured is looked up anew at each call ([`crate::conf`]).

use crate::address::IpNet;
use crate::attached::{Attached, Store, is_id};
use crate::bandwidth::{BadBandwidth, Bandwidth};
use crate::bridge::{Attach, Bridge, NetError, bring_loopback_up};
use crate::client::{Client, CniError, Subject};
use crate::conf::{self, Loaded};
use crate::gate::Gate;
use crate::offer::{self, BadAnnotation};
use crate::pod_cidr::{PodCidr, PodCidrError};
use crate::readiness::Readiness;
use crate::repair::Repair;
use crate::spec::{CniResult, LATEST, NetworkList};
use crate::{netns, plugin};
use berth_store::{RecordError, crash};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a status waits for what plugins say of themselves. The kubelet asks
/// every few seconds and gets what they said last.
const STATUS_PATIENCE: Duration = Duration::from_secs(2);

/// How long one plugin may take for DEL while somebody waits for the pod to be
/// stopped; what takes longer is tried again in the background.
const DEL_DEADLINE: Duration = Duration::from_secs(30);

/// How long GC waits for a moment in which no plugin works for a pod.
const GC_PATIENCE: Duration = Duration::from_secs(60);

/// How many dead attachments GC takes back at a time.
const GC_THREADS: usize = 8;

/// What happens while the CNI configuration directory holds no configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Pods get the built-in bridge.
    #[default]
    Builtin,
    /// The network is not ready until a configuration appears: what a node
    /// needs whose CNI plugin is installed by a DaemonSet.
    Wait,
}

/// Which of a pod's addresses is the first one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Primary {
    /// The first IPv4 address, where there is one.
    #[default]
    Ipv4,
    /// The first IPv6 address, where there is one.
    Ipv6,
    /// The one that the network named first.
    AsGiven,
}

/// How pods are networked.
#[derive(Clone, Debug)]
pub struct NetworkSettings {
    /// What to do without a CNI configuration.
    pub mode: Mode,
    /// Where CNI configurations are looked for; need not exist.
    pub cni_conf_dir: PathBuf,
    /// Where CNI plugins are looked for, first match wins.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// How long one CNI plugin may take.
    pub plugin_deadline: Duration,
    /// The name of the network that counts; `None` is the first by file name.
    pub cni_network: Option<String>,
    /// A template that becomes the configuration, where there is none, once the
    /// node's pod network is known.
    pub cni_template: Option<PathBuf>,
    /// Directories of configurations for pods of certain runtime handlers.
    pub handler_conf_dirs: BTreeMap<String, PathBuf>,
    /// Which address of a pod is the first.
    pub primary: Primary,
    /// The built-in network.
    pub bridge: crate::bridge::Settings,
}

impl NetworkSettings {
    /// The defaults: plugins where distributions put them, the built-in network
    /// with everything kept below `state_dir`.
    pub fn new(cni_conf_dir: PathBuf, state_dir: PathBuf) -> Self {
        Self {
            mode: Mode::Builtin,
            cni_conf_dir,
            cni_bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            plugin_deadline: Duration::from_secs(100),
            cni_network: None,
            cni_template: None,
            handler_conf_dirs: BTreeMap::new(),
            primary: Primary::default(),
            bridge: crate::bridge::Settings::new(state_dir),
        }
    }
}

/// Why pods cannot be networked now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotReady {
    /// One CamelCase word.
    pub reason: &'static str,
    /// A sentence for a person.
    pub message: String,
}

impl NotReady {
    pub(crate) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

/// Whether pods can be networked now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkStatus {
    /// CRI's NetworkReady.
    pub ready: bool,
    /// One CamelCase word; empty when ready.
    pub reason: String,
    /// A sentence for a person; empty when ready.
    pub message: String,
}

/// The pod an attachment belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// The sandbox's ID: what leases and links are known by.
    pub id: &'a str,
    /// The pod's name in Kubernetes.
    pub name: &'a str,
    /// Its namespace in Kubernetes.
    pub namespace: &'a str,
    /// Its UID in Kubernetes.
    pub uid: &'a str,
}

/// The transport of a host port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of the host that leads to a port of the pod.
///
/// Its JSON is what the CNI capability `portMappings` wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// 1 to 65535.
    pub host_port: u16,
    /// 1 to 65535.
    pub container_port: u16,
    /// The transport.
    pub protocol: Protocol,
    /// Only this address of the host; `None`, 0.0.0.0 and :: are all of them
    /// (the latter two of one family).
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// How names are resolved in a pod.
#[derive(Clone, Copy, Debug)]
pub struct Dns<'a> {
    /// Addresses.
    pub servers: &'a [String],
    /// Domains.
    pub searches: &'a [String],
    /// Options of resolv.conf.
    pub options: &'a [String],
}

/// What is wanted for a pod.
#[derive(Clone, Copy, Debug)]
pub struct AttachRequest<'a> {
    /// Whose attachment it is.
    pub pod: Pod<'a>,
    /// The pod's network namespace: a path that can be opened, such as the pin.
    pub netns: &'a Path,
    /// Host ports.
    pub port_mappings: &'a [PortMapping],
    /// The pod's annotations: given to plugins that ask for them.
    pub annotations: &'a BTreeMap<String, String>,
    /// The pod's cgroup as CRI names it, for plugins that ask; may be empty.
    pub cgroup_parent: &'a str,
    /// What the pod's resolv.conf is made of, for plugins that ask.
    pub dns: Option<Dns<'a>>,
    /// The pod's runtime handler: it may have a network of its own.
    pub handler: &'a str,
}

/// What is to be taken back.
#[derive(Clone, Copy, Debug)]
pub struct DetachRequest<'a> {
    /// Whose attachment it is.
    pub pod: Pod<'a>,
    /// The pod's network namespace; `None` when it is gone.
    pub netns: Option<&'a Path>,
}

/// What a pod got.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachResult {
    /// Primary address first.
    pub ips: Vec<IpAddr>,
    /// What [`Network::detach`] wants back, and what `crictl inspectp` shows:
    /// opaque, small, to be kept with the pod's record.
    pub record: serde_json::Value,
}

/// Why a pod could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The network is not ready; the status says the same.
    #[error("the network is not ready: {message}")]
    NotReady {
        /// What [`NetworkStatus::reason`] says.
        reason: String,
        /// What [`NetworkStatus::message`] says.
        message: String,
    },
    /// The ID cannot name files and links.
    #[error("{id:?} cannot be a pod's ID")]
    BadId {
        /// The ID.
        id: String,
    },
    /// Limits that are none.
    #[error(transparent)]
    Bandwidth(#[from] BadBandwidth),
    /// The built-in network.
    #[error(transparent)]
    Builtin(#[from] NetError),
    /// CNI plugins.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// What the pod asks of plugins by annotations.
    #[error(transparent)]
    Annotation(#[from] BadAnnotation),
    /// The node's pod network, or the configuration made with it.
    #[error(transparent)]
    PodCidr(#[from] PodCidrError),
    /// Kubernetes takes a pod without an address for one that is not there yet.
    #[error("the CNI network {network} gave the pod no address")]
    NoAddress {
        /// Its name.
        network: String,
    },
    /// Plugins were at work for pods all the time.
    #[error("there was no moment without a CNI plugin at work for {0:?}: GC comes later")]
    Busy(Duration),
    /// The directory of attachments.
    #[error("cannot {action} {path}")]
    Io {
        /// "make", "read".
        action: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The record of an attachment.
    #[error("cannot keep the attachment of pod {id}")]
    Record {
        /// Whose.
        id: String,
        /// Why not.
        source: RecordError,
    },
}

/// The name of a pod's interface.
const IFNAME: &str = "eth0";

/// What GC did.
#[derive(Debug)]
pub struct Collected {
    /// Whose networks were taken back.
    pub freed: Vec<String>,
    /// Whose could not be, and why: to be tried again by [`Network::retry`].
    pub failed: Vec<(String, NetworkError)>,
    /// What came of telling the plugins, and of the built-in network.
    pub rest: Result<(), NetworkError>,
}

/// The pods' network. Cheap to share; every method may be called from many threads.
#[derive(Debug)]
pub struct Network {
    settings: NetworkSettings,
    client: Arc<Client>,
    bridge: Arc<Bridge>,
    repair: Arc<Repair>,
    store: Store,
    pod_cidr: PodCidr,
    gate: Gate,
    readiness: Arc<Readiness>,
    /// What the last status said, to log changes.
    told: Mutex<Option<NetworkStatus>>,
}

/// Who networks a pod now.
enum By {
    Builtin,
    Plugins(NetworkList),
}

impl Network {
    /// The network that `settings` describe. Nothing of the kernel is touched yet.
    ///
    /// # Errors
    /// Settings that cannot work; state below `bridge.state_dir` that cannot be made.
    pub fn open(settings: NetworkSettings) -> Result<Self, NetworkError> {
        let state_dir = &settings.bridge.state_dir;
        let store = Store::open(state_dir).map_err(|(path, source)| NetworkError::Io {
            action: "make",
            path,
            source,
        })?;
        let pod_cidr = PodCidr::open(
            state_dir,
            settings.cni_conf_dir.clone(),
            settings.cni_template.clone(),
        );
        let client = Client::new(settings.cni_bin_dirs.clone(), settings.plugin_deadline);
        Ok(Self {
            client: Arc::new(client),
            bridge: Arc::new(Bridge::open(settings.bridge.clone())?),
            repair: Arc::default(),
            store,
            pod_cidr,
            gate: Gate::default(),
            readiness: Arc::default(),
            told: Mutex::default(),
            settings,
        })
    }

    /// Whether pods can be networked now. Looks anew each time, and asks the
    /// plugins that can say how they are (CNI 1.1); one that does not answer
    /// costs two seconds, and what it said last counts. Rules of the built-in
    /// network that somebody flushed are written again.
    pub fn status(&self) -> NetworkStatus {
        let ready = self.way("").and_then(|way| match way {
            By::Builtin => self.repair.ensure(&self.bridge, STATUS_PATIENCE),
            By::Plugins(list) => self.readiness.ask(&self.client, &list, STATUS_PATIENCE),
        });
        let status = match ready {
            Ok(()) => NetworkStatus {
                ready: true,
                reason: String::new(),
                message: String::new(),
            },
            Err(NotReady { reason, message }) => NetworkStatus {
                ready: false,
                reason: reason.into(),
                message,
            },
        };
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.as_ref() != Some(&status) {
            match status.ready {
                true => tracing::info!("the network is ready"),
                false => {
                    let (reason, message) = (&status.reason, &status.message);
                    tracing::warn!(reason, message, "the network is not ready");
                }
            }
            *told = Some(status.clone());
        }
        status
    }

    /// Whether there is anything to network a pod of `handler` with. Runs no plugin.
    ///
    /// # Errors
    /// `NotReady`.
    pub fn configured(&self, handler: &str) -> Result<(), NetworkError> {
        self.way(handler).map(drop).map_err(not_ready)
    }

    /// Gives the pod its network. Asked again for the same pod it is made anew;
    /// the built-in one gives the same addresses again.
    ///
    /// # Errors
    /// Whatever keeps the pod from its network; nothing is left behind then
    /// but what a plugin could not undo, which [`Network::gc`] tries again.
    pub fn attach(&self, request: &AttachRequest<'_>) -> Result<AttachResult, NetworkError> {
        check_id(request.pod.id)?;
        let mut attached = match self.way(request.handler).map_err(not_ready)? {
            By::Builtin => self.attach_builtin(request),
            By::Plugins(list) => self.attach_by_plugins(request, list),
        }?;
        match self.settings.primary {
            Primary::AsGiven => {}
            Primary::Ipv4 => attached.ips.sort_by_key(IpAddr::is_ipv6),
            Primary::Ipv6 => attached.ips.sort_by_key(IpAddr::is_ipv4),
        }
        Ok(attached)
    }

    fn attach_builtin(&self, request: &AttachRequest<'_>) -> Result<AttachResult, NetworkError> {
        let Pod {
            id,
            name,
            namespace,
            ..
        } = request.pod;
        let attachment = self.bridge.add(&Attach {
            id,
            name: &format!("{namespace}/{name}"),
            netns: request.netns,
            ifname: IFNAME,
            port_mappings: request.port_mappings,
            bandwidth: Bandwidth::from_annotations(request.annotations)?.unwrap_or_default(),
        })?;
        let result = plugin::result(&attachment, request.netns, LATEST);
        Ok(AttachResult {
            ips: attachment.ips.iter().map(IpNet::address).collect(),
            record: json!({ "builtin": true, "result": result }),
        })
    }

    fn attach_by_plugins(
        &self,
        request: &AttachRequest<'_>,
        list: NetworkList,
    ) -> Result<AttachResult, NetworkError> {
        let id = request.pod.id;
        let capabilities = offer::capabilities(request, &self.pod_cidr.subnets())?;
        let list = self.client.negotiate(list)?;
        let _alone = self.gate.pod(id);
        if let Some(before) = self.recorded(id)? {
            // ADD may not be repeated: what an earlier try made goes first.
            self.delete(&before, DEL_DEADLINE)?;
        }
        bring_loopback_up(request.netns)?;
        let mut attached = Attached {
            id: id.into(),
            list,
            args: offer::args(&request.pod),
            capabilities,
            netns: request.netns.into(),
            result: None,
        };
        self.keep(&attached)?;
        crash::point("network-add-recorded");
        let added = self
            .client
            .add(&attached.list, &subject(&attached, Some(request.netns)));
        crash::point("network-added");
        let kept = added.map_err(NetworkError::from).and_then(|result| {
            attached.result = Some(result.clone());
            self.keep(&attached)?;
            let result = CniResult::deserialize(result).unwrap_or_default();
            match result.pod_ips(IFNAME) {
                ips if ips.is_empty() => Err(NetworkError::NoAddress {
                    network: attached.list.name.clone(),
                }),
                ips => Ok(ips),
            }
        });
        let ips = kept.inspect_err(|_| {
            if let Err(error) = self.delete(&attached, DEL_DEADLINE) {
                tracing::warn!(
                    pod = id,
                    error = &error as &dyn std::error::Error,
                    "a failed CNI ADD could not be undone, will be tried again"
                );
            }
        })?;
        let record = serde_json::to_value(&attached).unwrap_or_default();
        Ok(AttachResult { ips, record })
    }

    /// Takes the pod's network back; one without any is fine, also after a
    /// restart and with the namespace gone. When it returns, the built-in
    /// network's link is down and off the bridge and its host ports and
    /// addresses are free; the link goes with the namespace.
    ///
    /// `record` is what [`Network::attach`] gave. It is only needed where the
    /// network's own state was lost.
    ///
    /// # Errors
    /// All steps are tried; what failed. Calling again is safe, and from then on
    /// [`Network::retry`] does.
    pub fn detach(
        &self,
        request: &DetachRequest<'_>,
        record: Option<&Value>,
    ) -> Result<(), NetworkError> {
        let id = request.pod.id;
        check_id(id)?;
        let _alone = self.gate.pod(id);
        let from_caller = || {
            let attached = Attached::deserialize(record?).ok()?;
            (attached.id == id).then_some(attached)
        };
        let attached = match self.recorded(id) {
            Ok(None) => Ok(from_caller()),
            Ok(some) => Ok(some),
            Err(error) => from_caller().map(Some).ok_or(error),
        };
        let plugins = attached.and_then(|attached| match attached {
            Some(mut attached) => {
                attached.netns = request.netns.unwrap_or(Path::new("")).into();
                self.delete(&attached, DEL_DEADLINE).inspect_err(|_| {
                    // It is this that the next try goes by, whoever makes it.
                    if let Err(error) = self.keep(&attached) {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(pod = id, error, "the attachment is not recorded again");
                    }
                })
            }
            None => Ok(()),
        });
        let builtin = self.bridge.del(id, IFNAME);
        plugins?;
        Ok(builtin?)
    }

    /// [`Network::detach`] of a pod that may be gone, with all the time a plugin
    /// may take, from what is recorded.
    ///
    /// # Errors
    /// What failed; calling again is safe.
    pub fn retry(&self, id: &str) -> Result<(), NetworkError> {
        check_id(id)?;
        let _alone = self.gate.pod(id);
        let plugins = self.recorded(id).and_then(|attached| match attached {
            Some(attached) => self.delete(&attached, Duration::MAX),
            None => Ok(()),
        });
        let builtin = self.bridge.del(id, IFNAME);
        plugins?;
        Ok(builtin?)
    }

    /// Asks the plugins whether the pod's network is as they made it (CHECK).
    /// Pods of the built-in network and of plugins before 0.4 are taken to be.
    ///
    /// # Errors
    /// The first plugin that says it is not.
    pub fn check(&self, id: &str) -> Result<(), NetworkError> {
        check_id(id)?;
        let _alone = self.gate.pod(id);
        let Some(attached) = self.recorded(id)? else {
            return Ok(());
        };
        let result = attached.result.clone().unwrap_or_default();
        let subject = subject(&attached, Some(&attached.netns));
        Ok(self.client.check(&attached.list, &subject, &result)?)
    }

    /// Takes back what the built-in network gave to pods that are not live, and
    /// says whose it was. Quick; [`Network::gc`] does it too.
    ///
    /// # Errors
    /// All of it is tried; the first failure.
    pub fn gc_builtin(
        &self,
        is_live: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<Vec<String>, NetworkError> {
        Ok(self.bridge.gc(|id, _| is_live(id))?)
    }

    /// Takes back what belongs to pods that are not live: for the start, when
    /// all pods are known, and now and then. Dead attachments get a DEL with
    /// what is recorded of them, whatever their plugins can; plugins that can do
    /// GC are told which attachments exist, while nothing else is done.
    ///
    /// It may take minutes where plugins hang. `is_live` is asked with IDs, also
    /// of pods that come to be meanwhile: those have to be live before they are
    /// attached.
    pub fn gc(&self, is_live: &(dyn Fn(&str) -> bool + Sync)) -> Collected {
        let mut collected = Collected {
            freed: Vec::new(),
            failed: Vec::new(),
            rest: Ok(()),
        };
        match self.recorded_ids() {
            Ok(mut ids) => {
                ids.retain(|id| !is_live(id));
                self.collect_dead(ids, is_live, &mut collected);
            }
            Err(error) => collected.rest = Err(error),
        }
        let told = self.tell_plugins(is_live);
        let builtin = self.gc_builtin(is_live);
        collected.rest = collected.rest.and(told).and(builtin.map(|freed| {
            collected.freed.extend(freed);
        }));
        collected
    }

    fn collect_dead(
        &self,
        ids: Vec<String>,
        is_live: &(dyn Fn(&str) -> bool + Sync),
        collected: &mut Collected,
    ) {
        let ids = Mutex::new(ids.into_iter());
        let done = Mutex::new(collected);
        let work = || {
            loop {
                let next = ids.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(id) = next else { return };
                let _alone = self.gate.pod(&id);
                if is_live(&id) {
                    continue;
                }
                let deleted = self.recorded(&id).and_then(|attached| {
                    attached
                        .map(|attached| self.delete(&attached, DEL_DEADLINE))
                        .transpose()
                });
                let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                match deleted {
                    Ok(Some(())) => done.freed.push(id),
                    Ok(None) => {}
                    Err(error) => done.failed.push((id, error)),
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..GC_THREADS {
                // Without more threads the first does it all.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
    }

    /// Runs GC for each network that is configured or that a pod is attached to.
    fn tell_plugins(&self, is_live: &(dyn Fn(&str) -> bool + Sync)) -> Result<(), NetworkError> {
        let mut failure = Ok(());
        let mut networks: BTreeMap<String, NetworkList> = BTreeMap::new();
        for handler in self.handlers() {
            if let Ok(By::Plugins(list)) = self.way(handler) {
                match self.client.negotiate(list) {
                    Ok(list) => _ = networks.entry(list.name.clone()).or_insert(list),
                    Err(error) => failure = failure.and(Err(error.into())),
                }
            }
        }
        let listed = self.recorded_ids()?;
        for attached in listed.iter().filter_map(|id| self.recorded(id).ok()?) {
            let list = attached.list;
            networks.entry(list.name.clone()).or_insert(list);
        }
        networks.retain(|_, list| list.speaks("1.1.0") && !list.disable_gc);
        if networks.is_empty() {
            return failure;
        }
        let Some(_alone) = self.gate.alone(GC_PATIENCE) else {
            return failure.and(Err(NetworkError::Busy(GC_PATIENCE)));
        };
        // Only now is it certain who is attached.
        let live: Vec<(String, Option<Attached>)> = self
            .recorded_ids()?
            .into_iter()
            .filter(|id| is_live(id))
            .map(|id| {
                let attached = self.recorded(&id).ok().flatten();
                (id, attached)
            })
            .collect();
        for list in networks.values() {
            // One whose record cannot be read may be of any network.
            let of_network = live.iter().filter(|(_, attached)| {
                attached
                    .as_ref()
                    .is_none_or(|attached| attached.list.name == list.name)
            });
            let valid: Vec<(&str, &str)> = of_network.map(|(id, _)| (&**id, IFNAME)).collect();
            if let Err(error) = self.client.gc(list, &valid) {
                failure = failure.and(Err(error.into()));
            }
        }
        failure
    }

    /// Takes note of the subnets that this node's pods have their addresses
    /// from, as the kubelet names them; kept over restarts. Makes the
    /// configuration where there is a template for it and no other configuration.
    ///
    /// # Errors
    /// It cannot be kept; the template is wrong.
    pub fn set_pod_cidr(&self, subnets: &[IpNet]) -> Result<(), NetworkError> {
        self.pod_cidr.set(subnets)?;
        let loaded = self.load("");
        let others = loaded.network.as_ref().is_some_and(|(path, _)| {
            // One that is rendered again may have other subnets now.
            *path != self.pod_cidr.rendered()
        });
        if !others {
            self.pod_cidr.render()?;
        }
        Ok(())
    }

    /// What [`Network::set_pod_cidr`] was last told.
    pub fn pod_cidr(&self) -> Vec<IpNet> {
        self.pod_cidr.subnets()
    }

    /// What is configured and what is wrong with it, for `crictl info` and `berth doctor`.
    pub fn info(&self) -> Value {
        let one = |handler: &str| {
            let Loaded {
                network,
                problems,
                others,
            } = self.load(handler);
            let ready = self.way(handler).map(drop);
            json!({
                "confDir": self.conf_dir(handler),
                "file": network.as_ref().map(|(path, _)| path),
                "network": network.as_ref().map(|(_, list)| list),
                "otherNetworks": others,
                "problems": told(&problems),
                "notReady": ready.err().map(|why| json!({ "reason": why.reason, "message": why.message })),
            })
        };
        let handlers = &self.settings.handler_conf_dirs;
        let handlers: BTreeMap<&str, Value> =
            handlers.keys().map(|name| (&**name, one(name))).collect();
        json!({
            "default": one(""),
            "handlers": handlers,
            "binDirs": self.settings.cni_bin_dirs,
            "template": self.settings.cni_template,
            "podCIDR": self.pod_cidr(),
            "attachments": self.recorded_ids().map(|ids| ids.len()).ok(),
        })
    }

    fn handlers(&self) -> impl Iterator<Item = &str> {
        let named = self.settings.handler_conf_dirs.keys().map(String::as_str);
        [""].into_iter().chain(named)
    }

    fn conf_dir(&self, handler: &str) -> &Path {
        let own = self.settings.handler_conf_dirs.get(handler);
        own.unwrap_or(&self.settings.cni_conf_dir)
    }

    fn load(&self, handler: &str) -> Loaded {
        let own = self.settings.handler_conf_dirs.contains_key(handler);
        let wanted = self.settings.cni_network.as_deref().filter(|_| !own);
        conf::load(self.conf_dir(handler), wanted)
    }

    /// Who networks pods of `handler` now, or why nobody does.
    fn way(&self, handler: &str) -> Result<By, NotReady> {
        let own = self.settings.handler_conf_dirs.contains_key(handler);
        let mut loaded = self.load(handler);
        if !own && loaded.network.is_none() && self.settings.cni_template.is_some() {
            match self.pod_cidr.render() {
                Ok(true) => loaded = self.load(handler),
                Ok(false) => {
                    let message = "the CNI configuration is made from a template once the kubelet names the node's pod network";
                    return Err(NotReady::new("PodCIDRUnknown", message));
                }
                Err(error) => return Err(NotReady::new("CNITemplateInvalid", chain(&error))),
            }
        }
        let dir = self.conf_dir(handler).display();
        let problems = told(&loaded.problems);
        match loaded.network {
            Some((path, list)) => match self.client.missing(&list) {
                Some(error) => Err(NotReady::new(
                    "CNIPluginMissing",
                    format!("{error}, but {} names it", path.display()),
                )),
                None => Ok(By::Plugins(list)),
            },
            // A file that is being written, or is wrong: not a reason to take the other way.
            None if !problems.is_empty() => {
                Err(NotReady::new("CNIConfigInvalid", problems.join("; ")))
            }
            None => match (&self.settings.cni_network, self.settings.mode) {
                (Some(wanted), _) if !own => {
                    let mut message = format!("no CNI network {wanted} in {dir}");
                    if !loaded.others.is_empty() {
                        message.push_str(&format!("; there is {}", loaded.others.join(", ")));
                    }
                    Err(NotReady::new("NetworkPluginNotReady", message))
                }
                (_, Mode::Builtin) if !own => match self.bridge.ready() {
                    Ok(()) => Ok(By::Builtin),
                    Err(error) => Err(NotReady::new("BuiltinNetworkNotReady", chain(&error))),
                },
                _ => Err(NotReady::new(
                    "NetworkPluginNotReady",
                    format!("no CNI configuration in {dir}"),
                )),
            },
        }
    }

    /// Runs DEL and forgets the attachment when it succeeded.
    fn delete(&self, attached: &Attached, deadline: Duration) -> Result<(), NetworkError> {
        // After a reboot the pin may be there and lead nowhere.
        let netns = Some(&*attached.netns).filter(|path| netns::is_one(path));
        let subject = subject(attached, netns);
        self.client
            .del(&attached.list, &subject, attached.result.as_ref(), deadline)?;
        crash::point("network-deleted");
        self.store
            .forget(&attached.id)
            .map_err(|source| record_error(&attached.id, source))
    }

    fn keep(&self, attached: &Attached) -> Result<(), NetworkError> {
        let kept = self.store.keep(attached);
        kept.map_err(|source| record_error(&attached.id, source))
    }

    fn recorded(&self, id: &str) -> Result<Option<Attached>, NetworkError> {
        let found = self.store.find(id);
        found.map_err(|source| record_error(id, source))
    }

    fn recorded_ids(&self) -> Result<Vec<String>, NetworkError> {
        self.store.ids().map_err(|source| NetworkError::Io {
            action: "read",
            path: self.store.dir().into(),
            source,
        })
    }
}

fn check_id(id: &str) -> Result<(), NetworkError> {
    match is_id(id) {
        true => Ok(()),
        false => Err(NetworkError::BadId { id: id.into() }),
    }
}

fn not_ready(why: NotReady) -> NetworkError {
    NetworkError::NotReady {
        reason: why.reason.into(),
        message: why.message,
    }
}

fn record_error(id: &str, source: RecordError) -> NetworkError {
    NetworkError::Record {
        id: id.into(),
        source,
    }
}

fn subject<'a>(attached: &'a Attached, netns: Option<&'a Path>) -> Subject<'a> {
    Subject {
        container_id: &attached.id,
        netns,
        ifname: IFNAME,
        args: &attached.args,
        capabilities: &attached.capabilities,
    }
}

/// Files and what is wrong with them, a line each.
fn told(problems: &[(PathBuf, conf::LoadError)]) -> Vec<String> {
    let lines = problems.iter();
    lines
        .map(|(path, why)| format!("{} {why}", path.display()))
        .collect()
}

/// An error with its causes, for a status that has one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut lines: Vec<String> = causes.map(ToString::to_string).collect();
    // Transparent errors say what their cause says.
    lines.dedup();
    lines.join(": ")
}
