//! The first process: what is run, with which environment and rights.

use super::{Input, OciError};
use crate::capability::{self, CapSet};
use crate::container_spec::{AppArmorProfile, EnvVar};
use crate::image::ImageConfig;
use oci_spec::runtime::{self as oci, Capability};
use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// Where programs are looked for when nobody says.
///
/// Source: what the peers set; `PATH` of a Debian root.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A set of capabilities of a spec; a name that only oci-spec knows is left out.
pub(crate) fn capability_set(set: Option<&HashSet<Capability>>) -> CapSet {
    let each = set
        .into_iter()
        .flatten()
        .filter_map(|one| CapSet::named(&one.to_string()).ok());
    each.fold(CapSet::EMPTY, CapSet::union)
}

fn oci_set(set: CapSet) -> Option<HashSet<Capability>> {
    let bare = |name: &str| name.strip_prefix("CAP_").unwrap_or_default().parse().ok();
    Some(set.names().filter_map(|name| bare(&name)).collect())
}

/// The process, and what a spec cannot hold of it.
pub(super) struct Built {
    pub process: oci::Process,
    pub raw_env: Vec<Vec<u8>>,
    pub unavailable: CapSet,
}

pub(super) fn build(input: &Input<'_>) -> Result<Built, OciError> {
    let container = input.container;
    let security = &container.security;
    let raw_env = env(input)?;
    let (capabilities, unavailable) = capabilities(input)?;
    let lossy = raw_env
        .iter()
        .map(|entry| String::from_utf8_lossy(entry).into_owned());

    let mut user = oci::User::default();
    user.set_uid(input.identity.uid)
        .set_gid(input.identity.gid)
        .set_umask(Some(input.defaults.umask))
        .set_additional_gids(Some(input.identity.groups.clone()));
    let rlimits = input.defaults.rlimits.iter().map(|(kind, (soft, hard))| {
        let limit = oci::PosixRlimitBuilder::default();
        limit.typ(kind.oci()).soft(*soft).hard(*hard).build()
    });
    let oom_score_adj = container.resources.oom_score_adj.unwrap_or(0);
    let mut process = oci::Process::default();
    process
        .set_terminal(Some(container.tty))
        .set_user(user)
        .set_args(Some(args(
            &container.command,
            &container.args,
            &input.image.config,
        )?))
        .set_env(Some(lossy.collect()))
        .set_cwd(cwd(
            &container.working_dir,
            &input.image.config.working_dir,
        )?)
        .set_capabilities(Some(capabilities))
        .set_rlimits(Some(rlimits.collect::<Result<_, _>>()?))
        .set_no_new_privileges(Some(security.no_new_privs))
        .set_oom_score_adj(Some(oom_score_adj.max(input.defaults.least_oom_score_adj)))
        .set_apparmor_profile(apparmor(input)?);
    if let Some(labels) = input.selinux {
        process.set_selinux_label(super::some(&labels.process));
    }
    Ok(Built {
        process,
        raw_env,
        unavailable,
    })
}

/// What is run: a command replaces the image's entrypoint and with it the
/// image's own arguments; arguments replace the image's.
///
/// Source: Kubernetes, "Define a Command and Arguments for a Container".
fn args(command: &[String], args: &[String], image: &ImageConfig) -> Result<Vec<String>, OciError> {
    let (program, rest) = match (command, args) {
        ([], []) => (&image.entrypoint[..], &image.cmd[..]),
        ([], args) => (&image.entrypoint[..], args),
        (command, args) => (command, args),
    };
    let all = [program, rest].concat();
    if all.first().is_none_or(String::is_empty) {
        return Err(OciError::NoCommand);
    }
    for argument in &all {
        no_nul(argument.as_bytes(), || format!("the argument {argument:?}"))?;
    }
    Ok(all)
}

fn no_nul(bytes: &[u8], what: impl Fn() -> String) -> Result<(), OciError> {
    if bytes.contains(&0) {
        Err(OciError::NulByte { what: what() })
    } else {
        Ok(())
    }
}

/// Where it starts: a relative path is below the root, as image builders mean it.
fn cwd(asked: &str, image: &str) -> Result<PathBuf, OciError> {
    let path = if asked.is_empty() { image } else { asked };
    no_nul(path.as_bytes(), || "the working directory".into())?;
    Ok(Path::new("/").join(path))
}

/// NAME=value in order; one that comes later takes the place of the earlier
/// one of that name. Indexed: a pod in a large namespace has a variable for
/// every port of thousands of services.
#[derive(Default)]
struct Env {
    entries: Vec<Vec<u8>>,
    by_name: HashMap<String, usize>,
}

impl Env {
    fn set(&mut self, name: &str, value: &[u8]) {
        let entry = [name.as_bytes(), b"=", value].concat();
        match self.by_name.get(name) {
            Some(at) => self.entries[*at] = entry,
            None => {
                self.by_name.insert(name.to_owned(), self.entries.len());
                self.entries.push(entry);
            }
        }
    }

    fn set_if_absent(&mut self, name: &str, value: &[u8]) {
        if !self.by_name.contains_key(name) {
            self.set(name, value);
        }
    }
}

fn env(input: &Input<'_>) -> Result<Vec<Vec<u8>>, OciError> {
    let mut env = Env::default();
    env.set("PATH", PATH.as_bytes());
    if input.container.tty {
        env.set("TERM", b"xterm");
    }
    for (name, value) in &input.defaults.env {
        env.set(name, value.as_bytes());
    }
    for entry in &input.image.config.env {
        // Builders leave lines without '=' or name in; they mean nothing to execve.
        if let Some((name, value)) = entry.split_once('=').filter(|(name, _)| !name.is_empty()) {
            env.set(name, value.as_bytes());
        }
    }
    env.set("HOSTNAME", input.files.hostname_text.as_bytes());
    for EnvVar { name, value } in &input.container.env {
        if name.is_empty() || name.contains('=') {
            return Err(OciError::BadEnvName { name: name.clone() });
        }
        env.set(name, value);
    }
    env.set_if_absent("HOME", input.identity.home.as_bytes());
    for entry in &env.entries {
        let name = || String::from_utf8_lossy(entry.split(|b| *b == b'=').next().unwrap_or(b""));
        no_nul(entry, || format!("the environment variable {:?}", name()))?;
    }
    Ok(env.entries)
}

fn capabilities(input: &Input<'_>) -> Result<(oci::LinuxCapabilities, CapSet), OciError> {
    let security = &input.container.security;
    let available = input.defaults.capabilities;
    let sets = capability::resolve_from(
        &security.capabilities,
        security.privileged,
        available,
        input.defaults.usual_capabilities,
    )?;
    let mut out = oci::LinuxCapabilities::default();
    out.set_bounding(oci_set(sets.bounding))
        .set_effective(oci_set(sets.effective))
        .set_permitted(oci_set(sets.permitted))
        .set_inheritable(oci_set(sets.inheritable))
        .set_ambient(oci_set(sets.ambient));
    Ok((out, sets.unavailable))
}

/// The profile's name. Who is privileged has the runtime's default only on demand.
fn apparmor(input: &Input<'_>) -> Result<Option<String>, OciError> {
    let security = &input.container.security;
    let available = &input.defaults.apparmor_profile;
    match &security.apparmor {
        AppArmorProfile::Unconfined => Ok(None),
        AppArmorProfile::RuntimeDefault if security.privileged => Ok(None),
        AppArmorProfile::RuntimeDefault => Ok(available.clone()),
        AppArmorProfile::Localhost(profile) if input.defaults.apparmor => Ok(Some(profile.clone())),
        AppArmorProfile::Localhost(profile) => Err(OciError::NoAppArmor {
            profile: profile.clone(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(words: &str) -> Vec<String> {
        words.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn command_and_args_replace_the_images() {
        let image = ImageConfig {
            entrypoint: list("entry -e"),
            cmd: list("cmd"),
            ..ImageConfig::default()
        };
        for (command, arguments, all) in [
            ("", "", "entry -e cmd"),
            ("", "a b", "entry -e a b"),
            ("c", "", "c"),
            ("c d", "a", "c d a"),
        ] {
            let got = args(&list(command), &list(arguments), &image).unwrap();
            assert_eq!(got, list(all), "command {command:?}, args {arguments:?}");
        }
    }

    #[test]
    fn nothing_to_run_is_an_error() {
        let image = ImageConfig::default();
        assert!(matches!(args(&[], &[], &image), Err(OciError::NoCommand)));
        assert!(matches!(
            args(&[String::new()], &[], &image),
            Err(OciError::NoCommand)
        ));
        assert_eq!(args(&[], &list("sh"), &image).unwrap(), ["sh"]);
    }

    #[test]
    fn a_nul_byte_is_refused() {
        let image = ImageConfig::default();
        let refused = args(&["a\0b".into()], &[], &image);
        assert!(matches!(refused, Err(OciError::NulByte { .. })));
        cwd("/a\0", "").unwrap_err();
    }

    #[test]
    fn the_working_directory_is_absolute() {
        assert_eq!(cwd("", "").unwrap(), Path::new("/"));
        assert_eq!(cwd("", "srv").unwrap(), Path::new("/srv"));
        assert_eq!(cwd("/data", "srv").unwrap(), Path::new("/data"));
    }

    #[test]
    fn names_of_capabilities_agree_with_oci_specs() {
        let all = CapSet::up_to(40);
        assert_eq!(capability_set(oci_set(all).as_ref()), all);
        let admin = HashSet::from([Capability::SysAdmin, Capability::CheckpointRestore]);
        assert_eq!(capability_set(Some(&admin)).bits(), 1 << 21 | 1 << 40);
        assert_eq!(capability_set(None), CapSet::EMPTY);
    }
}
