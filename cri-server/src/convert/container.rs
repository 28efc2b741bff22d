//! ContainerConfig to [`ContainerSpec`].

use super::field::{Field, Quoted, Result};
use super::{NodeFacts, image, mount, not_yet, resources, security, signal, text};
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container_spec::{
    AppArmorProfile, ContainerName, ContainerSpec, EnvVar, RunAs, SeccompProfile, SecurityContext,
};
use berth_sandbox::pod_spec::{Namespace, PidMode, PodSpec};

/// Everything CreateContainer asks for, checked, for a container of `pod`.
pub fn container_spec(
    config: Option<&cri::ContainerConfig>,
    pod: &PodSpec,
    node: &NodeFacts,
) -> Result<ContainerSpec> {
    let root = Field::root("config");
    let config = config.ok_or_else(|| root.invalid("must be given"))?;
    if config.windows.is_some() {
        return Err(root
            .at("windows")
            .invalid("is given, but this node runs Linux"));
    }
    let metadata_field = root.at("metadata");
    let metadata = config
        .metadata
        .as_ref()
        .ok_or_else(|| metadata_field.invalid("must be given"))?;
    let image_field = root.at("image");
    let image = config
        .image
        .as_ref()
        .ok_or_else(|| image_field.invalid("must be given"))?;
    let linux_field = root.at("linux");
    let linux = config.linux.clone().unwrap_or_default();
    let stop_signal = security::enumeration(&root.at("stop_signal"), config.stop_signal)?;

    let spec = ContainerSpec {
        name: ContainerName {
            name: text::name(&metadata_field.at("name"), &metadata.name)?,
            attempt: metadata.attempt,
        },
        image: image::request(&image_field, image)?,
        command: words(&root.at("command"), &config.command)?,
        args: words(&root.at("args"), &config.args)?,
        working_dir: match config.working_dir.as_str() {
            "" => String::new(),
            path => text::container_path(&root.at("working_dir"), path)?,
        },
        env: env(&root.at("envs"), &config.envs)?,
        mounts: each(&root.at("mounts"), &config.mounts, mount::mount)?,
        devices: each(&root.at("devices"), &config.devices, mount::device)?,
        cdi_devices: each(
            &root.at("CDI_devices"),
            &config.cdi_devices,
            |field, device| mount::cdi_device(field, &device.name),
        )?,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        log_path: text::relative_path(&root.at("log_path"), &config.log_path)?,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: match &linux.resources {
            Some(given) => resources::resources(&linux_field.at("resources"), given)?,
            None => Default::default(),
        },
        security: security_context(
            &linux_field.at("security_context"),
            linux.security_context.unwrap_or_default(),
            pod,
            node,
        )?,
        stop_signal: signal::number(stop_signal),
    };
    not_yet::check_container(&spec, node)?;
    Ok(spec)
}

/// Every item of a repeated field.
fn each<A, B>(
    field: &Field<'_>,
    items: &[A],
    parse: impl Fn(&Field<'_>, &A) -> Result<B>,
) -> Result<Vec<B>> {
    items
        .iter()
        .enumerate()
        .map(|(i, item)| parse(&field.index(i), item))
        .collect()
}

/// Arguments of a program.
pub fn words(field: &Field<'_>, words: &[String]) -> Result<Vec<String>> {
    each(field, words, |field, word| {
        text::no_nul(field, word).map(|()| word.clone())
    })
}

fn env(field: &Field<'_>, given: &[cri::KeyValue]) -> Result<Vec<EnvVar>> {
    each(field, given, |field, pair| {
        let bad = |c: char| c == '=' || c == '\0';
        if pair.key.is_empty() || pair.key.contains(bad) {
            let problem = format!("{} is not the name of a variable", Quoted(&pair.key));
            return Err(field.at("key").invalid(problem));
        }
        // The value stays out of the message: it may be a secret.
        if pair.value.contains(&0) {
            return Err(field
                .at("value")
                .invalid(format!("of {} holds a NUL", Quoted(&pair.key))));
        }
        Ok(EnvVar {
            name: pair.key.clone(),
            value: pair.value.clone(),
        })
    })
}

fn security_context(
    field: &Field<'_>,
    context: cri::LinuxContainerSecurityContext,
    pod: &PodSpec,
    node: &NodeFacts,
) -> Result<SecurityContext> {
    let privileged = context.privileged;
    if privileged && !pod.security.privileged {
        return Err(field
            .at("privileged")
            .invalid("is set, but the pod sandbox was not made privileged"));
    }
    let options = field.at("namespace_options");
    let pid = match &context.namespace_options {
        None => pod.namespaces.pid.clone(),
        Some(option) => {
            let parsed = security::namespaces(&options, option)?;
            if parsed.user.is_some() && parsed.user != pod.namespaces.user {
                return Err(options
                    .at("userns_options")
                    .invalid("differs from the pod's"));
            }
            // The kubelet sends what it sent for the pod. POD says nothing: it is also what a
            // request without a word on it decodes to.
            for (name, asked, pods) in [
                ("network", parsed.network, pod.namespaces.network),
                ("ipc", parsed.ipc, pod.namespaces.ipc),
            ] {
                if asked == Namespace::Node && pods == Namespace::Pod {
                    return Err(options
                        .at(name)
                        .invalid("is NODE, and the pod has a namespace of its own"));
                }
            }
            if pod.namespaces.user.is_some() && parsed.pid == PidMode::Node {
                return Err(options.at("pid").invalid(super::pod::NO_NODE_PIDS));
            }
            match parsed.pid {
                // POD is also what a request that does not say decodes to, and what
                // there is to share was decided with the pod.
                PidMode::Pod => pod.namespaces.pid.clone(),
                other => other,
            }
        }
    };
    let paths = |name: &str, paths: &[String]| {
        each(&field.at(name), paths, |field, path| {
            text::container_path(field, path)
        })
    };
    // A privileged container is not filtered, whatever is asked for.
    let seccomp = security::seccomp(
        field,
        context.seccomp.as_ref(),
        &context.seccomp_profile_path,
    )?;
    let seccomp = match seccomp {
        _ if privileged => SeccompProfile::Unconfined,
        Some(profile) => profile,
        None => node.unset_seccomp.clone(),
    };
    let apparmor =
        match security::apparmor(field, context.apparmor.as_ref(), &context.apparmor_profile)? {
            Some(AppArmorProfile::RuntimeDefault) | None if privileged => {
                AppArmorProfile::Unconfined
            }
            Some(profile) => profile,
            None => AppArmorProfile::RuntimeDefault,
        };
    Ok(SecurityContext {
        privileged,
        capabilities: security::capabilities(
            &field.at("capabilities"),
            context.capabilities.as_ref(),
        )?,
        network: pod.namespaces.network,
        ipc: pod.namespaces.ipc,
        pid,
        user: run_as(field, &context)?,
        supplemental_groups: security::groups(
            &field.at("supplemental_groups"),
            &context.supplemental_groups,
        )?,
        supplemental_groups_policy: security::groups_policy(
            &field.at("supplemental_groups_policy"),
            context.supplemental_groups_policy,
        )?,
        readonly_rootfs: context.readonly_rootfs,
        no_new_privs: context.no_new_privs,
        masked_paths: paths("masked_paths", &context.masked_paths)?,
        readonly_paths: paths("readonly_paths", &context.readonly_paths)?,
        seccomp,
        apparmor,
        selinux: security::selinux(
            &field.at("selinux_options"),
            context.selinux_options.as_ref(),
        )?,
    })
}

fn run_as(field: &Field<'_>, context: &cri::LinuxContainerSecurityContext) -> Result<RunAs> {
    let uid = security::optional_id(&field.at("run_as_user"), context.run_as_user.as_ref())?;
    let gid = security::optional_id(&field.at("run_as_group"), context.run_as_group.as_ref())?;
    let username = &context.run_as_username;
    security::group_needs_user(field, gid.is_some(), uid.is_some() || !username.is_empty())?;
    // Fields of passwd(5) are separated by colons, its lines by newlines.
    if username.len() > 256
        || username
            .chars()
            .any(|c| c.is_control() || c == ':' || c == '/')
    {
        let problem = format!("{} is not a user's name", Quoted(username));
        return Err(field.at("run_as_username").invalid(problem));
    }
    Ok(RunAs {
        uid,
        gid,
        username: username.clone(),
    })
}
