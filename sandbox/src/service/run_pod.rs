//! RunPodSandbox: record, files, cgroup, monitor, namespaces, network, ready.
//!
//! Every step can be undone by `teardown` from the record alone, whether or not
//! it was reached: that is all that recovery needs.

use super::{Inner, Sandboxes, blocking, internal, now};
use crate::error::{Kind, Result, SandboxError};
use crate::id::PodId;
use crate::monitor::{self, Monitor};
use crate::operation::{Stage, lock};
use crate::pod::{PodEvent, PodRecord, PodState};
use crate::pod_files;
use crate::pod_spec::{IdMapping, Namespace, PidMode, PodSpec, Protocol};
use berth_netplugin::network::{self, AttachRequest, AttachResult, Pod, PortMapping};
use berth_proto::monitor_v1::{self, request};
use berth_store::crash;
use std::collections::BTreeMap;
use std::sync::Arc;

impl Sandboxes {
    /// Makes a pod sandbox and brings it to Ready; the ID of the one that is
    /// there already when a ready one, or one being made, has the same name.
    ///
    /// # Errors
    /// What any step met; nothing is left of the pod then.
    pub async fn run_pod(&self, spec: PodSpec) -> Result<PodId> {
        let name = &spec.name;
        let object = format!(
            "{:?}",
            (&name.uid, &name.namespace, &name.name, name.attempt)
        );
        let subject = name.to_string();
        let id = self
            .0
            .operation("RunPodSandbox", object, subject, |me, stage| async move {
                me.run_pod(spec, stage).await.map(String::from)
            })
            .await?;
        id.parse().map_err(internal("the operation gave no ID"))
    }
}

impl Inner {
    async fn run_pod(self: &Arc<Self>, spec: PodSpec, stage: Stage) -> Result<PodId> {
        let view = self.objects.view();
        if let Some(pod) = view
            .pods()
            .find(|pod| pod.state.is_ready() && pod.spec.name == spec.name)
        {
            return Ok(pod.id.clone());
        }
        self.check_user_namespace(&spec)?;
        self.check_handler(&spec)?;
        if spec.namespaces.network == Namespace::Pod {
            let (me, handler) = (self.clone(), spec.runtime_handler.clone());
            blocking(move || {
                let configured = me.network.configured(&handler);
                configured.map_err(internal("no pod can be run now"))
            })
            .await?;
        }
        stage.enter("record");
        let pod = PodRecord {
            id: PodId::random().map_err(internal("no random ID"))?,
            spec,
            state: PodState::Creating,
            created_at: now(),
            boot_id: self.boot_id.clone(),
            ips: Vec::new(),
            network: None,
            cgroup: None,
            selinux: None,
            message: String::new(),
            unreadable: false,
        };
        let me = self.clone();
        let pod = blocking(move || me.insert_labelled(pod)).await?;
        crash::point("run_pod.record");
        let made = self.make_pod(&pod, &stage).await;
        if let Err(error) = made {
            stage.enter("undo");
            self.undo_pod(&pod.id).await;
            return Err(error);
        }
        Ok(pod.id.clone())
    }

    async fn make_pod(self: &Arc<Self>, pod: &Arc<PodRecord>, stage: &Stage) -> Result<()> {
        stage.enter("files");
        let (me, record) = (self.clone(), pod.clone());
        blocking(move || {
            let dir = me.run_dir(&record.id);
            make_dir(&dir)?;
            let resolv = &me.settings.host_resolv_conf;
            let labels = record.selinux.as_ref();
            let label = labels.map_or("", |labels| labels.mount.as_str());
            pod_files::make(&dir, &record.spec, resolv, label)
                .map_err(internal("cannot make the pod's files"))?;
            make_log_directory(&record.spec)?;
            if record.spec.namespaces.network == Namespace::Pod {
                let pin = dir.join("netns");
                std::fs::File::create(&pin)
                    .map_err(internal(format!("cannot make {}", pin.display())))?;
            }
            crash::point("run_pod.files");
            Ok(())
        })
        .await?;

        stage.enter("cgroup");
        let (me, record) = (self.clone(), pod.clone());
        blocking(move || {
            let own = me.own_cgroup(&record.id);
            let given = &record.spec.cgroup_parent;
            let path = if given.is_empty() { &own } else { given };
            let parent = me
                .cgroups
                .ensure_parent(path)
                .map_err(internal(format!("cannot make the pod's cgroup {path}")))?;
            me.objects.update_pod(&record.id, |pod| {
                pod.cgroup = Some(parent);
                Ok(())
            })?;
            crash::point("run_pod.cgroup");
            Ok(())
        })
        .await?;

        stage.enter("monitor");
        let (me, id) = (self.clone(), pod.id.clone());
        blocking(move || {
            let lines = me.settings.log_line_bytes;
            monitor::spawn(&me.program, id.as_str(), &me.run_dir(&id), lines)
                .map_err(internal(format!("pod sandbox {id} gets no monitor")))
        })
        .await?;
        let monitor = self.connect(&pod.id).await?;
        crash::point("run_pod.monitor");

        stage.enter("namespaces");
        self.make_namespaces(pod, &monitor).await?;
        crash::point("run_pod.namespaces");

        stage.enter("network");
        let attached = self.attach(pod).await?;
        crash::point("run_pod.network");

        stage.enter("ready");
        let (me, id) = (self.clone(), pod.id.clone());
        blocking(move || {
            me.objects.update_pod(&id, |pod| {
                pod.state = pod.state.on(&PodEvent::Made).ok_or_else(|| {
                    SandboxError::new(
                        Kind::WrongState,
                        format!("pod sandbox {} was stopped", pod.id),
                    )
                })?;
                if let Some(attached) = attached {
                    pod.ips = attached.ips;
                    pod.network = Some(attached.record);
                }
                Ok(())
            })
        })
        .await?;
        crash::point("run_pod.ready");
        Ok(())
    }

    /// The cgroup of a pod whose caller names none.
    pub(super) fn own_cgroup(&self, id: &PodId) -> String {
        self.cgroups.own_parent(id)
    }

    /// Connects to the pod's monitor and keeps the connection.
    pub(super) async fn connect(&self, id: &PodId) -> Result<Arc<Monitor>> {
        let monitor = Monitor::connect(&self.run_dir(id), id.clone(), self.events.clone())
            .await
            .map_err(internal(format!("pod sandbox {id}: no monitor")))?;
        let monitor = Arc::new(monitor);
        lock(&self.monitors).insert(id.clone(), monitor.clone());
        Ok(monitor)
    }

    async fn make_namespaces(&self, pod: &PodRecord, monitor: &Monitor) -> Result<()> {
        let spec = &pod.spec;
        let own_net = spec.namespaces.network == Namespace::Pod;
        let pin = self.run_dir(&pod.id).join("netns");
        let message = monitor_v1::MakeNamespaces {
            net: own_net,
            ipc: spec.namespaces.ipc == Namespace::Pod,
            // A pod on the host's network shares the host's name, as the kubelet expects.
            uts: own_net,
            pid: spec.namespaces.pid == PidMode::Pod,
            net_pin: if own_net {
                pin.to_string_lossy().into_owned()
            } else {
                String::new()
            },
            hostname: if own_net {
                pod_files::hostname(spec)
            } else {
                String::new()
            },
            sysctls: sysctls(&self.settings.defaults.sysctls, spec),
            uid_map: id_map(spec.namespaces.user.as_ref().map(|user| &user.uids)),
            gid_map: id_map(spec.namespaces.user.as_ref().map(|user| &user.gids)),
            init_label: match &pod.selinux {
                Some(labels) if !spec.security.privileged => labels.process.clone(),
                Some(_) | None => String::new(),
            },
        };
        monitor
            .tell(request::Body::MakeNamespaces(message), Vec::new())
            .await
            .map_err(|error| {
                let text = format!("cannot make the namespaces of pod sandbox {}", pod.id);
                SandboxError::caused(Kind::Internal, text, error)
            })
    }

    async fn attach(self: &Arc<Self>, pod: &Arc<PodRecord>) -> Result<Option<AttachResult>> {
        if pod.spec.namespaces.network == Namespace::Node {
            return Ok(None);
        }
        let (me, pod) = (self.clone(), pod.clone());
        blocking(move || {
            let netns = me.run_dir(&pod.id).join("netns");
            let port_mappings = port_mappings(&pod.spec);
            let dns = pod.spec.dns.as_ref().map(|dns| network::Dns {
                servers: &dns.servers,
                searches: &dns.searches,
                options: &dns.options,
            });
            let request = AttachRequest {
                pod: network_pod(&pod),
                netns: &netns,
                port_mappings: &port_mappings,
                annotations: &pod.spec.annotations,
                cgroup_parent: &pod.spec.cgroup_parent,
                dns,
                handler: &pod.spec.runtime_handler,
            };
            let attached = me.network.attach(&request).map_err(internal(format!(
                "cannot give pod sandbox {} its network",
                pod.id
            )))?;
            Ok(Some(attached))
        })
        .await
    }
}

pub(super) fn network_pod(pod: &PodRecord) -> Pod<'_> {
    Pod {
        id: pod.id.as_str(),
        name: &pod.spec.name.name,
        namespace: &pod.spec.name.namespace,
        uid: &pod.spec.name.uid,
    }
}

/// Those of the node's configuration that this pod has a namespace for, and its own.
fn sysctls(defaults: &BTreeMap<String, String>, spec: &PodSpec) -> Vec<monitor_v1::Sysctl> {
    let own = |name: &str| match name.starts_with("net.") {
        true => spec.namespaces.network == Namespace::Pod,
        false => spec.namespaces.ipc == Namespace::Pod,
    };
    let mut all: BTreeMap<&String, &String> =
        defaults.iter().filter(|(name, _)| own(name)).collect();
    all.extend(&spec.sysctls);
    // Dots separate, and a slash stands for a dot in a name: in paths it is the other way round.
    let path = |name: &str| {
        let swap = |c| match c {
            '.' => '/',
            '/' => '.',
            other => other,
        };
        name.chars().map(swap).collect()
    };
    all.into_iter()
        .map(|(name, value)| monitor_v1::Sysctl {
            path: path(name),
            value: value.clone(),
        })
        .collect()
}

fn id_map(ranges: Option<&Vec<IdMapping>>) -> Vec<monitor_v1::IdRange> {
    let range = |range: &IdMapping| monitor_v1::IdRange {
        container_id: range.container_id,
        host_id: range.host_id,
        length: range.length,
    };
    ranges.into_iter().flatten().map(range).collect()
}

fn port_mappings(spec: &PodSpec) -> Vec<PortMapping> {
    spec.port_mappings
        .iter()
        .map(|mapping| PortMapping {
            host_port: mapping.host_port,
            container_port: mapping.container_port,
            protocol: match mapping.protocol {
                Protocol::Tcp => network::Protocol::Tcp,
                Protocol::Udp => network::Protocol::Udp,
                Protocol::Sctp => network::Protocol::Sctp,
            },
            host_ip: mapping.host_ip,
        })
        .collect()
}

fn make_dir(dir: &std::path::Path) -> Result<()> {
    match std::fs::create_dir(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => {
            let text = format!("cannot make {}", dir.display());
            Err(SandboxError::caused(Kind::Internal, text, error))
        }
    }
}

fn make_log_directory(spec: &PodSpec) -> Result<()> {
    if spec.log_directory.as_os_str().is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(&spec.log_directory).map_err(|error| {
        let text = format!(
            "cannot make the log directory {}",
            spec.log_directory.display()
        );
        SandboxError::caused(Kind::Internal, text, error)
    })
}
