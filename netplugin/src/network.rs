//! The pod network as the rest of Berth sees it.
//!
//! ```text
//! DIR/attachments/<pod>    configuration and result of a pod's CNI plugins
//! ```
//!
//! What the built-in network gave is known by its leases. What CNI plugins gave
//! is recorded before they are run and after: DEL gets the configuration and
//! the result of ADD whatever became of the files and of the caller.

use crate::address::IpNet;
use crate::bridge::{Attach, Bridge, NetError, bring_loopback_up};
use crate::client::{self, Client, CniError, Loaded, Subject};
use crate::plugin;
use crate::spec::{CniResult, LATEST, NetworkList, is_name};
use berth_store::atomic_file::{Durability, is_temporary};
use berth_store::{Record, RecordError, crash, record};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// The built-in network.
    pub bridge: crate::bridge::Settings,
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
    /// The built-in network.
    #[error(transparent)]
    Builtin(#[from] NetError),
    /// CNI plugins.
    #[error(transparent)]
    Cni(#[from] CniError),
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

/// What CNI plugins were told for a pod, and what they gave.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Attached {
    id: String,
    list: NetworkList,
    /// CNI_ARGS.
    args: String,
    capabilities: Map<String, Value>,
    /// `None` until ADD is through.
    result: Option<Value>,
}

impl Record for Attached {
    const KIND: &'static str = "attachment";
    const VERSION: u32 = 1;
}

/// The pods' network. Cheap to share; every method may be called from many threads.
#[derive(Debug)]
pub struct Network {
    mode: Mode,
    conf_dir: PathBuf,
    client: Client,
    bridge: Bridge,
    attachments: PathBuf,
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
        let attachments = settings.bridge.state_dir.join("attachments");
        std::fs::create_dir_all(&attachments).map_err(|source| NetworkError::Io {
            action: "make",
            path: attachments.clone(),
            source,
        })?;
        Ok(Self {
            mode: settings.mode,
            conf_dir: settings.cni_conf_dir,
            client: Client {
                bin_dirs: settings.cni_bin_dirs,
                deadline: settings.plugin_deadline,
            },
            bridge: Bridge::open(settings.bridge)?,
            attachments,
        })
    }

    /// Whether pods can be networked now. Looks anew each time, runs nothing.
    pub fn status(&self) -> NetworkStatus {
        match self.way() {
            Ok(_) => NetworkStatus {
                ready: true,
                reason: String::new(),
                message: String::new(),
            },
            Err((reason, message)) => NetworkStatus {
                ready: false,
                reason: reason.into(),
                message,
            },
        }
    }

    /// Gives the pod its network. Asked again for the same pod it is made anew;
    /// the built-in one gives the same addresses again.
    ///
    /// # Errors
    /// Whatever keeps the pod from its network; nothing is left behind then
    /// but what a plugin could not undo, which [`Network::gc`] tries again.
    pub fn attach(&self, request: &AttachRequest<'_>) -> Result<AttachResult, NetworkError> {
        check_id(request.pod.id)?;
        let way = self
            .way()
            .map_err(|(reason, message)| NetworkError::NotReady {
                reason: reason.into(),
                message,
            })?;
        match way {
            By::Builtin => self.attach_builtin(request),
            By::Plugins(list) => self.attach_by_plugins(request, list),
        }
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
        if let Some(before) = self.recorded(id)? {
            // ADD may not be repeated: what an earlier try made goes first.
            self.delete(&before, Some(request.netns))?;
        }
        bring_loopback_up(request.netns)?;
        let mut attached = Attached {
            id: id.into(),
            list,
            args: cni_args(&request.pod),
            capabilities: capabilities(request),
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
            Ok(result)
        });
        let result = kept.inspect_err(|_| {
            if let Err(error) = self.delete(&attached, Some(request.netns)) {
                tracing::warn!(
                    pod = id,
                    error = &error as &dyn std::error::Error,
                    "a failed CNI ADD could not be undone, will be tried again"
                );
            }
        })?;
        let ips = serde_json::from_value::<CniResult>(result)
            .unwrap_or_default()
            .pod_ips();
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
    /// All steps are tried; what failed. Calling again is safe.
    pub fn detach(
        &self,
        request: &DetachRequest<'_>,
        record: Option<&Value>,
    ) -> Result<(), NetworkError> {
        let id = request.pod.id;
        check_id(id)?;
        let attached = match self.recorded(id) {
            Ok(Some(attached)) => Ok(Some(attached)),
            other => match record.and_then(|record| Attached::deserialize(record).ok()) {
                Some(attached) if attached.id == id => Ok(Some(attached)),
                _ => other,
            },
        };
        let plugins = attached.and_then(|attached| match attached {
            Some(attached) => self.delete(&attached, request.netns),
            None => Ok(()),
        });
        let builtin = self.bridge.del(id, IFNAME);
        plugins?;
        Ok(builtin?)
    }

    /// Takes back what belongs to pods other than `live`, by their IDs, and says
    /// what it was. For the start, when all pods are known, and now and then.
    ///
    /// # Errors
    /// All of it is tried; the first failure.
    pub fn gc(&self, live: &[&str]) -> Result<Vec<String>, NetworkError> {
        let live: BTreeSet<&str> = live.iter().copied().collect();
        let mut dead = Vec::new();
        let mut failure = Ok(());
        for id in self.recorded_ids()? {
            if live.contains(&*id) {
                continue;
            }
            let deleted = self.recorded(&id).and_then(|attached| match attached {
                Some(attached) => self.delete(&attached, None),
                None => Ok(()),
            });
            match deleted {
                Ok(()) => dead.push(id),
                Err(error) => failure = failure.and(Err(error)),
            }
        }
        if let Some((_, list)) = client::load(&self.conf_dir).network {
            let attachments: Vec<(&str, &str)> = live.iter().map(|id| (*id, IFNAME)).collect();
            if let Err(error) = self.client.gc(&list, &attachments) {
                failure = failure.and(Err(error.into()));
            }
        }
        match self.bridge.gc(|id, _| live.contains(id)) {
            Ok(more) => dead.extend(more),
            Err(error) => failure = failure.and(Err(error.into())),
        }
        failure.map(|()| dead)
    }

    /// Who networks pods now, or CRI's reason and message why nobody does.
    fn way(&self) -> Result<By, (&'static str, String)> {
        let Loaded { network, problems } = client::load(&self.conf_dir);
        let told: Vec<String> = problems
            .iter()
            .map(|(path, why)| format!("{} {why}", path.display()))
            .collect();
        match network {
            Some((path, list)) => match self.client.missing(&list) {
                Some(error) => Err((
                    "CNIPluginMissing",
                    format!("{error}, but {} names it", path.display()),
                )),
                None => Ok(By::Plugins(list)),
            },
            // A file that is being written, or is wrong: not a reason to take the other way.
            None if !told.is_empty() => Err(("CNIConfigInvalid", told.join("; "))),
            None => match self.mode {
                Mode::Wait => Err((
                    "NetworkPluginNotReady",
                    format!("no CNI configuration in {}", self.conf_dir.display()),
                )),
                Mode::Builtin => match self.bridge.ready() {
                    Ok(()) => Ok(By::Builtin),
                    Err(error) => Err(("BuiltinNetworkNotReady", error.to_string())),
                },
            },
        }
    }

    /// Runs DEL and forgets the attachment when it succeeded.
    fn delete(&self, attached: &Attached, netns: Option<&Path>) -> Result<(), NetworkError> {
        self.client.del(
            &attached.list,
            &subject(attached, netns),
            attached.result.as_ref(),
        )?;
        crash::point("network-deleted");
        self.record(&attached.id, |path| {
            record::remove(path, Durability::PowerCut)
        })
    }

    fn keep(&self, attached: &Attached) -> Result<(), NetworkError> {
        self.record(&attached.id, |path| {
            record::save(path, attached, Durability::PowerCut)
        })
    }

    fn recorded(&self, id: &str) -> Result<Option<Attached>, NetworkError> {
        self.record(id, |path| match record::load(path) {
            Ok(attached) => Ok(Some(attached)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        })
    }

    fn record<T>(
        &self,
        id: &str,
        work: impl FnOnce(&Path) -> Result<T, RecordError>,
    ) -> Result<T, NetworkError> {
        work(&self.attachments.join(id)).map_err(|source| NetworkError::Record {
            id: id.into(),
            source,
        })
    }

    fn recorded_ids(&self) -> Result<Vec<String>, NetworkError> {
        let error = |source| NetworkError::Io {
            action: "read",
            path: self.attachments.clone(),
            source,
        };
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.attachments).map_err(error)? {
            if let Ok(name) = entry.map_err(error)?.file_name().into_string()
                && !is_temporary(&name)
            {
                ids.push(name);
            }
        }
        ids.sort();
        Ok(ids)
    }
}

/// IDs name files, and CNI allows them no more than names.
fn check_id(id: &str) -> Result<(), NetworkError> {
    if is_name(id) && id.len() <= 128 {
        Ok(())
    } else {
        Err(NetworkError::BadId { id: id.into() })
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

/// What Kubernetes' plugins expect to be told. Names of Kubernetes have no `;`.
fn cni_args(pod: &Pod<'_>) -> String {
    let clean = |text: &str| text.replace([';', '='], "_");
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        clean(pod.namespace),
        clean(pod.name),
        pod.id,
        clean(pod.uid)
    )
}

/// What plugins may ask for. Source: CNI's CONVENTIONS.md, "Dynamic plugin specific fields".
fn capabilities(request: &AttachRequest<'_>) -> Map<String, Value> {
    let mut offered = Map::new();
    if !request.port_mappings.is_empty() {
        offered.insert("portMappings".into(), json!(request.port_mappings));
    }
    if !request.annotations.is_empty() {
        offered.insert(
            "io.kubernetes.cri.pod-annotations".into(),
            json!(request.annotations),
        );
    }
    if !request.cgroup_parent.is_empty() {
        offered.insert("cgroupPath".into(), json!(request.cgroup_parent));
    }
    offered
}
