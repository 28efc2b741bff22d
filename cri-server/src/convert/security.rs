//! Namespaces, IDs, capabilities and profiles, for pods and containers alike.

use super::field::{Field, Quoted, Refused, Result};
use super::text;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::capability::CapSet;
use berth_sandbox::container_spec::{
    AppArmorProfile, Capabilities, GroupsPolicy, SeccompProfile, SelinuxLabel,
};
use berth_sandbox::pod_spec::{IdMapping, Namespace, PidMode, UserNamespace};
use cri::security_profile::ProfileType;

/// Most supplementary groups of a process. Source: NGROUPS_MAX, linux/limits.h.
const GROUPS_MAX: usize = 65_536;

/// The value of an enum field; what this version of CRI does not know is refused.
pub fn enumeration<E: TryFrom<i32>>(field: &Field<'_>, value: i32) -> Result<E> {
    E::try_from(value).map_err(|_| field.invalid(format!("{value} is not a value CRI v1 knows")))
}

/// A user or group ID. Source: uid_t is 32 bits, the largest value means "none".
fn unix_id(field: &Field<'_>, value: i64) -> Result<u32> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| field.invalid(format!("{value} is not a user or group ID")))
}

pub fn optional_id(field: &Field<'_>, value: Option<&cri::Int64Value>) -> Result<Option<u32>> {
    value.map(|value| unix_id(field, value.value)).transpose()
}

pub fn groups(field: &Field<'_>, values: &[i64]) -> Result<Vec<u32>> {
    if values.len() > GROUPS_MAX {
        return Err(field.invalid(format!("holds more than {GROUPS_MAX} groups")));
    }
    values
        .iter()
        .enumerate()
        .map(|(i, value)| unix_id(&field.index(i), *value))
        .collect()
}

pub fn groups_policy(field: &Field<'_>, value: i32) -> Result<GroupsPolicy> {
    Ok(match enumeration(field, value)? {
        cri::SupplementalGroupsPolicy::Merge => GroupsPolicy::Merge,
        cri::SupplementalGroupsPolicy::Strict => GroupsPolicy::Strict,
    })
}

fn pod_or_node(field: &Field<'_>, value: i32) -> Result<Namespace> {
    match enumeration(field, value)? {
        cri::NamespaceMode::Pod => Ok(Namespace::Pod),
        cri::NamespaceMode::Node => Ok(Namespace::Node),
        mode @ (cri::NamespaceMode::Container | cri::NamespaceMode::Target) => {
            Err(field.invalid(format!(
                "{} is not possible here, POD or NODE is",
                mode.as_str_name()
            )))
        }
    }
}

/// What NamespaceOption says.
pub struct Namespaces {
    pub network: Namespace,
    pub ipc: Namespace,
    pub pid: PidMode,
    pub user: Option<UserNamespace>,
}

pub fn namespaces(field: &Field<'_>, option: &cri::NamespaceOption) -> Result<Namespaces> {
    let pid_field = field.at("pid");
    let pid = match enumeration(&pid_field, option.pid)? {
        cri::NamespaceMode::Pod => PidMode::Pod,
        cri::NamespaceMode::Container => PidMode::Container,
        cri::NamespaceMode::Node => PidMode::Node,
        cri::NamespaceMode::Target => {
            PidMode::Target(text::id(&field.at("target_id"), &option.target_id)?.to_owned())
        }
    };
    if !option.target_id.is_empty() && !matches!(pid, PidMode::Target(_)) {
        return Err(field
            .at("target_id")
            .invalid("is given, but pid is not TARGET"));
    }
    let user = match &option.userns_options {
        Some(user) => user_namespace(&field.at("userns_options"), user)?,
        None => None,
    };
    Ok(Namespaces {
        network: pod_or_node(&field.at("network"), option.network)?,
        ipc: pod_or_node(&field.at("ipc"), option.ipc)?,
        pid,
        user,
    })
}

fn user_namespace(field: &Field<'_>, user: &cri::UserNamespace) -> Result<Option<UserNamespace>> {
    match pod_or_node(&field.at("mode"), user.mode)? {
        Namespace::Node if user.uids.is_empty() && user.gids.is_empty() => Ok(None),
        Namespace::Node => Err(field.invalid("mappings are given, but mode is NODE")),
        Namespace::Pod => {
            let uids = user_mapping(&field.at("uids"), &user.uids)?;
            let gids = user_mapping(&field.at("gids"), &user.gids)?;
            Ok(Some(UserNamespace { uids, gids }))
        }
    }
}

/// CRI allows exactly one range, and it must begin at the container's 0.
fn user_mapping(field: &Field<'_>, mappings: &[cri::IdMapping]) -> Result<Vec<IdMapping>> {
    let mappings = id_mappings(field, mappings)?;
    match &mappings[..] {
        [one] if one.container_id == 0 => Ok(mappings),
        [_] => Err(field.invalid("must begin at container_id 0")),
        _ => Err(field.invalid(format!("must hold one mapping, not {}", mappings.len()))),
    }
}

pub fn id_mappings(field: &Field<'_>, mappings: &[cri::IdMapping]) -> Result<Vec<IdMapping>> {
    let mut parsed = Vec::with_capacity(mappings.len());
    for (i, mapping) in mappings.iter().enumerate() {
        let fits = |first: u32| first.checked_add(mapping.length).is_some();
        if mapping.length == 0 || !fits(mapping.container_id) || !fits(mapping.host_id) {
            return Err(field
                .index(i)
                .invalid("is empty or reaches beyond the last ID"));
        }
        parsed.push(IdMapping {
            container_id: mapping.container_id,
            host_id: mapping.host_id,
            length: mapping.length,
        });
    }
    Ok(parsed)
}

/// A range as CRI shows it.
pub fn id_mapping(mapping: &IdMapping) -> cri::IdMapping {
    cri::IdMapping {
        host_id: mapping.host_id,
        container_id: mapping.container_id,
        length: mapping.length,
    }
}

fn capability_names(field: &Field<'_>, names: &[String]) -> Result<Vec<String>> {
    let mut parsed = Vec::with_capacity(names.len());
    for (i, given) in names.iter().enumerate() {
        let upper = given.to_ascii_uppercase();
        let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if name != "ALL" && CapSet::named(name).is_err() {
            let problem = format!("{} is not a capability", Quoted(given));
            return Err(field.index(i).invalid(problem));
        }
        parsed.push(name.to_owned());
    }
    Ok(parsed)
}

pub fn capabilities(field: &Field<'_>, given: Option<&cri::Capability>) -> Result<Capabilities> {
    let Some(given) = given else {
        return Ok(Capabilities::default());
    };
    Ok(Capabilities {
        add: capability_names(&field.at("add_capabilities"), &given.add_capabilities)?,
        drop: capability_names(&field.at("drop_capabilities"), &given.drop_capabilities)?,
        add_ambient: capability_names(
            &field.at("add_ambient_capabilities"),
            &given.add_ambient_capabilities,
        )?,
    })
}

/// A profile in either of the two ways CRI has for it.
enum Profile {
    Unset,
    RuntimeDefault,
    Unconfined,
    Localhost(String),
}

/// The new field wins; the deprecated one counts where the new one is absent.
fn profile(
    fields: (&Field<'_>, &Field<'_>),
    new: Option<&cri::SecurityProfile>,
    deprecated: &str,
) -> Result<Profile> {
    let (field, old) = fields;
    let Some(new) = new else {
        return match deprecated {
            "" => Ok(Profile::Unset),
            "runtime/default" | "docker/default" => Ok(Profile::RuntimeDefault),
            "unconfined" => Ok(Profile::Unconfined),
            other => match other.strip_prefix("localhost/") {
                Some(name) if !name.is_empty() => Ok(Profile::Localhost(name.to_owned())),
                _ => Err(old.invalid(format!("{} is not a profile", Quoted(other)))),
            },
        };
    };
    let kind = enumeration(&field.at("profile_type"), new.profile_type)?;
    let reference = field.at("localhost_ref");
    match kind {
        ProfileType::RuntimeDefault | ProfileType::Unconfined if !new.localhost_ref.is_empty() => {
            Err(reference.invalid("is given, but profile_type is not Localhost"))
        }
        ProfileType::RuntimeDefault => Ok(Profile::RuntimeDefault),
        ProfileType::Unconfined => Ok(Profile::Unconfined),
        ProfileType::Localhost => {
            // Older kubelets put the prefix here too.
            let name = new
                .localhost_ref
                .strip_prefix("localhost/")
                .unwrap_or(&new.localhost_ref);
            match name.is_empty() {
                true => Err(reference.invalid("must not be empty for a Localhost profile")),
                false => Ok(Profile::Localhost(name.to_owned())),
            }
        }
    }
}

/// `None`: the request does not say.
pub fn seccomp(
    context: &Field<'_>,
    new: Option<&cri::SecurityProfile>,
    deprecated: &str,
) -> Result<Option<SeccompProfile>> {
    let (field, old) = (context.at("seccomp"), context.at("seccomp_profile_path"));
    Ok(match profile((&field, &old), new, deprecated)? {
        Profile::Unset => None,
        Profile::RuntimeDefault => Some(SeccompProfile::RuntimeDefault),
        Profile::Unconfined => Some(SeccompProfile::Unconfined),
        Profile::Localhost(path) => {
            let named = if new.is_some() { &field } else { &old };
            Some(SeccompProfile::Localhost(text::host_path(named, &path)?))
        }
    })
}

/// `None`: the request does not say.
pub fn apparmor(
    context: &Field<'_>,
    new: Option<&cri::SecurityProfile>,
    deprecated: &str,
) -> Result<Option<AppArmorProfile>> {
    let (field, old) = (context.at("apparmor"), context.at("apparmor_profile"));
    Ok(match profile((&field, &old), new, deprecated)? {
        Profile::Unset => None,
        Profile::RuntimeDefault => Some(AppArmorProfile::RuntimeDefault),
        Profile::Unconfined => Some(AppArmorProfile::Unconfined),
        Profile::Localhost(name) => {
            if name.chars().any(|c| c.is_control()) {
                return Err(field.invalid(format!("{} is not a profile's name", Quoted(&name))));
            }
            Some(AppArmorProfile::Localhost(name))
        }
    })
}

pub fn selinux(
    field: &Field<'_>,
    label: Option<&cri::SeLinuxOption>,
) -> Result<Option<SelinuxLabel>> {
    let Some(label) = label else { return Ok(None) };
    for (name, part) in [
        ("user", &label.user),
        ("role", &label.role),
        ("type", &label.r#type),
        // A level holds colons: s0:c1,c2.
        ("level", &label.level),
    ] {
        let bad = |c: char| c.is_control() || c.is_whitespace() || (name != "level" && c == ':');
        if part.chars().any(bad) {
            return Err(field
                .at(name)
                .invalid(format!("{} is not part of a label", Quoted(part))));
        }
    }
    let label = SelinuxLabel {
        user: label.user.clone(),
        role: label.role.clone(),
        r#type: label.r#type.clone(),
        level: label.level.clone(),
    };
    Ok((label != SelinuxLabel::default()).then_some(label))
}

/// run_as_group alone would leave open whose group it is.
/// Source: CRI, LinuxContainerSecurityContext.run_as_group.
pub fn group_needs_user(field: &Field<'_>, group: bool, user: bool) -> Result<()> {
    let refused: Option<Refused> = (group && !user).then(|| {
        field
            .at("run_as_group")
            .invalid("is given without run_as_user")
    });
    refused.map_or(Ok(()), Err)
}
