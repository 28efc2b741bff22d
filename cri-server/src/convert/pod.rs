//! PodSandboxConfig to [`PodSpec`].

use super::field::{Field, Quoted, Result};
use super::{NodeFacts, resources, security, text};
use berth_proto::runtime_v1 as cri;
use berth_sandbox::pod_spec::{
    Dns, Namespace, PodName, PodNamespaces, PodSecurity, PodSpec, PortMapping, Protocol,
};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Why a pod or container in a user namespace does not see the host's processes.
pub(super) const NO_NODE_PIDS: &str = "NODE is not possible in a user namespace";

/// Everything RunPodSandbox asks for, checked.
pub fn pod_spec(request: &cri::RunPodSandboxRequest, node: &NodeFacts) -> Result<PodSpec> {
    let root = Field::root("config");
    let config = request
        .config
        .as_ref()
        .ok_or_else(|| root.invalid("must be given"))?;
    if config.windows.is_some() {
        return Err(root
            .at("windows")
            .invalid("is given, but this node runs Linux"));
    }
    if !node.handlers.has(&request.runtime_handler) {
        let problem = format!(
            "{} is not a handler of this node",
            Quoted(&request.runtime_handler)
        );
        return Err(Field::root("runtime_handler").invalid(problem));
    }
    let linux_field = root.at("linux");
    let linux = config.linux.clone().unwrap_or_default();
    let context_field = linux_field.at("security_context");
    let context = linux.security_context.unwrap_or_default();
    let namespaces = pod_namespaces(&context_field, context.namespace_options.as_ref())?;
    let limits = |name: &str, given: Option<&cri::LinuxContainerResources>| {
        given
            .map(|given| resources::resources(&linux_field.at(name), given))
            .transpose()
    };
    Ok(PodSpec {
        name: pod_name(&root.at("metadata"), config.metadata.as_ref())?,
        hostname: text::host_name(&root.at("hostname"), &config.hostname)?,
        log_directory: match config.log_directory.as_str() {
            "" => Default::default(),
            path => text::host_path(&root.at("log_directory"), path)?,
        },
        dns: config
            .dns_config
            .as_ref()
            .map(|given| dns(&root.at("dns_config"), given))
            .transpose()?,
        port_mappings: port_mappings(&root.at("port_mappings"), &config.port_mappings)?,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        cgroup_parent: cgroup_parent(&linux_field.at("cgroup_parent"), &linux.cgroup_parent)?,
        sysctls: sysctls(&linux_field.at("sysctls"), &linux.sysctls, &namespaces)?,
        overhead: limits("overhead", linux.overhead.as_ref())?,
        resources: limits("resources", linux.resources.as_ref())?,
        security: pod_security(&context_field, context)?,
        namespaces,
        runtime_handler: request.runtime_handler.clone(),
    })
}

fn pod_name(field: &Field<'_>, metadata: Option<&cri::PodSandboxMetadata>) -> Result<PodName> {
    let metadata = metadata.ok_or_else(|| field.invalid("must be given"))?;
    Ok(PodName {
        name: text::name(&field.at("name"), &metadata.name)?,
        namespace: text::name(&field.at("namespace"), &metadata.namespace)?,
        // crictl's users may leave it out; namespace and name are unique without it.
        uid: text::optional_name(&field.at("uid"), &metadata.uid)?,
        attempt: metadata.attempt,
    })
}

fn pod_namespaces(
    context: &Field<'_>,
    option: Option<&cri::NamespaceOption>,
) -> Result<PodNamespaces> {
    let Some(option) = option else {
        return Ok(PodNamespaces::default());
    };
    let field = context.at("namespace_options");
    let parsed = security::namespaces(&field, option)?;
    if matches!(parsed.pid, berth_sandbox::pod_spec::PidMode::Target(_)) {
        return Err(field
            .at("pid")
            .invalid("TARGET is for containers, not for a pod"));
    }
    if parsed.user.is_some() && parsed.pid == berth_sandbox::pod_spec::PidMode::Node {
        // The host's /proc could not be mounted, and would show what the pod may not see.
        return Err(field.at("pid").invalid(NO_NODE_PIDS));
    }
    Ok(PodNamespaces {
        network: parsed.network,
        ipc: parsed.ipc,
        pid: parsed.pid,
        user: parsed.user,
    })
}

fn dns(field: &Field<'_>, given: &cri::DnsConfig) -> Result<Dns> {
    for (i, server) in given.servers.iter().enumerate() {
        let address = server
            .split_once('%')
            .map_or(server.as_str(), |(address, _)| address);
        if address.parse::<IpAddr>().is_err() || server.chars().any(char::is_whitespace) {
            let problem = format!("{} is not an IP address", Quoted(server));
            return Err(field.at("servers").index(i).invalid(problem));
        }
    }
    for (name, words) in [("searches", &given.searches), ("options", &given.options)] {
        for (i, word) in words.iter().enumerate() {
            // They share a line in resolv.conf.
            if word.is_empty() || word.chars().any(|c| c.is_control() || c.is_whitespace()) {
                let problem = format!("{} is not one word", Quoted(word));
                return Err(field.at(name).index(i).invalid(problem));
            }
        }
    }
    Ok(Dns {
        servers: given.servers.clone(),
        searches: given.searches.clone(),
        options: given.options.clone(),
    })
}

fn port(field: &Field<'_>, value: i32) -> Result<u16> {
    u16::try_from(value).map_err(|_| field.invalid(format!("{value} is not a port, 0 to 65535")))
}

fn port_mappings(field: &Field<'_>, given: &[cri::PortMapping]) -> Result<Vec<PortMapping>> {
    let mut mappings: Vec<PortMapping> = Vec::new();
    for (i, mapping) in given.iter().enumerate() {
        let item = field.index(i);
        let protocol = match security::enumeration(&item.at("protocol"), mapping.protocol)? {
            cri::Protocol::Tcp => Protocol::Tcp,
            cri::Protocol::Udp => Protocol::Udp,
            cri::Protocol::Sctp => Protocol::Sctp,
        };
        let container_port = port(&item.at("container_port"), mapping.container_port)?;
        let host_port = port(&item.at("host_port"), mapping.host_port)?;
        let address = item.at("host_ip");
        let host_ip =
            match mapping.host_ip.as_str() {
                "" => None,
                text => Some(text.parse().map_err(|_| {
                    address.invalid(format!("{} is not an IP address", Quoted(text)))
                })?),
            };
        if container_port == 0 {
            return Err(item.at("container_port").invalid("must be 1 to 65535"));
        }
        // A mapping without a host port only tells which ports the pod has.
        if host_port == 0 {
            continue;
        }
        let mapping = PortMapping {
            protocol,
            container_port,
            host_port,
            host_ip,
        };
        let same = |other: &PortMapping| {
            (other.protocol, other.host_port, other.host_ip) == (protocol, host_port, host_ip)
        };
        if mappings.iter().any(same) {
            return Err(item.invalid(format!("host port {host_port} is mapped twice")));
        }
        mappings.push(mapping);
    }
    Ok(mappings)
}

fn cgroup_parent(field: &Field<'_>, given: &str) -> Result<String> {
    if given.len() > 4095 || given.chars().any(char::is_control) {
        return Err(field.invalid(format!("{} is not a cgroup", Quoted(given))));
    }
    if given.split('/').any(|part| part == ".." || part == ".") {
        return Err(field.invalid(format!("{} holds \".\" or \"..\"", Quoted(given))));
    }
    Ok(given.to_owned())
}

/// Sysctls the kernel keeps per IPC namespace.
/// Source: ipc/ipc_sysctl.c, ipc/mq_sysctl.c; namespaces(7).
const IPC_SYSCTLS: [&str; 11] = [
    "kernel.auto_msgmni",
    "kernel.msg_next_id",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.sem_next_id",
    "kernel.shm_next_id",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
];

/// A sysctl's name with dots between its parts; a dot inside a part is a slash.
/// Source: sysctl.d(5): the first separator decides which of the two forms it is.
fn dotted(name: &str) -> String {
    if name
        .find(['.', '/'])
        .is_some_and(|at| name.as_bytes()[at] == b'/')
    {
        return name
            .chars()
            .map(|c| {
                if c == '/' {
                    '.'
                } else if c == '.' {
                    '/'
                } else {
                    c
                }
            })
            .collect();
    }
    name.to_owned()
}

/// Sysctls by dotted name, each of a namespace that the pod has of its own.
pub(crate) fn sysctls(
    field: &Field<'_>,
    given: &std::collections::HashMap<String, String>,
    namespaces: &PodNamespaces,
) -> Result<BTreeMap<String, String>> {
    let mut parsed = BTreeMap::new();
    for (given_name, value) in given {
        let entry = field.key(given_name);
        let name = dotted(given_name);
        let plain =
            |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'/' | b'@' | b':');
        // "/" stands for a dot, so a part of dots alone would be "." or "..".
        let part = |part: &str| {
            !part.is_empty() && !part.bytes().all(|b| b == b'/') && part.bytes().all(plain)
        };
        if name.len() > 253 || !name.contains('.') || !name.split('.').all(part) {
            return Err(entry.invalid("is not the name of a sysctl"));
        }
        let ipc = IPC_SYSCTLS.contains(&name.as_str())
            || name == "kernel.shmmni"
            || name.starts_with("fs.mqueue.");
        let net = name.starts_with("net.");
        if !ipc && !net {
            return Err(entry.invalid("belongs to the whole node, not to a pod"));
        }
        if ipc && namespaces.ipc == Namespace::Node {
            return Err(entry.invalid("cannot be set: the pod uses the host's IPC namespace"));
        }
        if net && namespaces.network == Namespace::Node {
            return Err(entry.invalid("cannot be set: the pod uses the host's network"));
        }
        if value.len() > 4095 || value.chars().any(|c| c.is_control() && c != '\t') {
            return Err(entry.invalid(format!("{} is not a value", Quoted(value))));
        }
        if parsed.insert(name, value.clone()).is_some() {
            return Err(entry.invalid("is given twice, with dots and with slashes"));
        }
    }
    Ok(parsed)
}

fn pod_security(
    field: &Field<'_>,
    context: cri::LinuxSandboxSecurityContext,
) -> Result<PodSecurity> {
    let run_as_user =
        security::optional_id(&field.at("run_as_user"), context.run_as_user.as_ref())?;
    let run_as_group =
        security::optional_id(&field.at("run_as_group"), context.run_as_group.as_ref())?;
    security::group_needs_user(field, run_as_group.is_some(), run_as_user.is_some())?;
    security::groups_policy(
        &field.at("supplemental_groups_policy"),
        context.supplemental_groups_policy,
    )?;
    // The sandbox has no process to confine, but what is asked for must make sense.
    security::apparmor(field, context.apparmor.as_ref(), "")?;
    let seccomp = security::seccomp(
        field,
        context.seccomp.as_ref(),
        &context.seccomp_profile_path,
    )?;
    Ok(PodSecurity {
        run_as_user,
        run_as_group,
        supplemental_groups: security::groups(
            &field.at("supplemental_groups"),
            &context.supplemental_groups,
        )?,
        readonly_rootfs: context.readonly_rootfs,
        privileged: context.privileged,
        seccomp,
        selinux: security::selinux(
            &field.at("selinux_options"),
            context.selinux_options.as_ref(),
        )?,
    })
}
