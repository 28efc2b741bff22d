//! Mount options as a spec has them: words of mount(8), sorted by what they do.

use berth_sys::mount::{Propagation, attr};
use oci_spec::runtime::Mount;
use rustix::mount::{MountFlags, MountPropagationFlags};

/// Words that are flags. Each but `relatime`, which is the default anyway, has
/// a recursive form with an `r` before it.
const FLAGS: [(&str, MountFlags, u64); 9] = [
    ("ro", MountFlags::RDONLY, attr::RDONLY),
    ("nosuid", MountFlags::NOSUID, attr::NOSUID),
    ("nodev", MountFlags::NODEV, attr::NODEV),
    ("noexec", MountFlags::NOEXEC, attr::NOEXEC),
    ("noatime", MountFlags::NOATIME, attr::NOATIME),
    ("strictatime", MountFlags::STRICTATIME, attr::STRICTATIME),
    ("nodiratime", MountFlags::NODIRATIME, attr::NODIRATIME),
    ("nosymfollow", NOSYMFOLLOW, attr::NOSYMFOLLOW),
    ("relatime", MountFlags::RELATIME, 0),
];

/// MS_NOSYMFOLLOW. Source: linux/mount.h, Linux 5.10.
const NOSYMFOLLOW: MountFlags = MountFlags::from_bits_retain(256);

/// Words that only say what is so anyway. They take nothing away: "rw" on a
/// mount that the host has read-only leaves it read-only.
const DEFAULTS: [&str; 8] = [
    "defaults", "rw", "suid", "dev", "exec", "atime", "diratime", "async",
];

/// The options of one mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// A bind mount; whether with all that is mounted below.
    pub bind: Option<bool>,
    flags: Option<MountFlags>,
    /// MOUNT_ATTR_* bits of the mount itself.
    pub set: u64,
    /// MOUNT_ATTR_* bits of all mounts below, too.
    pub set_below: u64,
    /// How mounts are passed on; whether also below.
    pub propagation: Option<(Propagation, bool)>,
    /// Owners are mapped; whether also below.
    pub idmap: Option<bool>,
    /// What is left for the file system.
    pub data: Vec<String>,
}

impl Options {
    pub fn parse(mount: &Mount) -> Self {
        let mut out = Options::default();
        if mount.typ().as_deref() == Some("bind") {
            out.bind = Some(false);
        }
        for word in mount.options().iter().flatten() {
            out.word(word);
        }
        out
    }

    fn word(&mut self, word: &str) {
        use Propagation::{Private, Shared, Slave};
        let flag = |name: &str| FLAGS.iter().find(|(known, ..)| *known == name);
        if let Some((_, flag, attr)) = flag(word) {
            *self.flags.get_or_insert(MountFlags::empty()) |= *flag;
            self.set |= attr;
            return;
        }
        let below = word.strip_prefix('r').and_then(flag);
        if let Some((_, _, attr)) = below.filter(|(_, _, attr)| *attr != 0) {
            self.set_below |= attr;
            return;
        }
        match word {
            "bind" => self.bind = self.bind.or(Some(false)),
            "rbind" => self.bind = Some(true),
            "private" => self.propagation = Some((Private, false)),
            "rprivate" => self.propagation = Some((Private, true)),
            "slave" => self.propagation = Some((Slave, false)),
            "rslave" => self.propagation = Some((Slave, true)),
            "shared" => self.propagation = Some((Shared, false)),
            "rshared" => self.propagation = Some((Shared, true)),
            "idmap" => self.idmap = Some(false),
            "ridmap" => self.idmap = Some(true),
            _ if DEFAULTS.contains(&word) => {}
            _ => self.data.push(word.to_owned()),
        }
    }

    /// Whether mounts made in the container appear on the host.
    pub fn shares(&self) -> bool {
        matches!(self.propagation, Some((Propagation::Shared, _)))
    }

    /// MS_* bits of mount(2).
    pub fn flags(&self) -> u64 {
        self.flags.unwrap_or(MountFlags::empty()).bits().into()
    }

    /// MS_PRIVATE, MS_SLAVE or MS_SHARED, perhaps with MS_REC; 0 for neither.
    pub fn propagation_bits(&self) -> u64 {
        let Some((propagation, below)) = self.propagation else {
            return 0;
        };
        let kind = match propagation {
            Propagation::Private => MountPropagationFlags::PRIVATE,
            Propagation::Slave => MountPropagationFlags::DOWNSTREAM,
            Propagation::Shared => MountPropagationFlags::SHARED,
        };
        let rec = if below {
            MountPropagationFlags::REC
        } else {
            MountPropagationFlags::empty()
        };
        (kind | rec).bits().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(typ: &str, words: &str) -> Options {
        let mut mount = Mount::default();
        mount
            .set_typ(Some(typ.into()))
            .set_options(Some(words.split(',').map(str::to_owned).collect()));
        Options::parse(&mount)
    }

    #[test]
    fn words_are_flags_or_the_file_systems() {
        let options = parse("tmpfs", "nosuid,strictatime,mode=755,size=65536k,rw");
        assert_eq!(options.flags(), 2 | 1 << 24);
        assert_eq!(options.data, ["mode=755", "size=65536k"]);
        assert_eq!((options.bind, options.propagation_bits()), (None, 0));
    }

    #[test]
    fn words_of_binds() {
        let options = parse("bind", "rbind,rslave,ro,noexec");
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.set, attr::RDONLY | attr::NOEXEC);
        // MS_SLAVE | MS_REC
        assert_eq!(options.propagation_bits(), 1 << 19 | 1 << 14);
        assert!(!options.shares() && options.data.is_empty());

        let options = parse("bind", "rro,rshared,ridmap");
        assert_eq!((options.bind, options.set), (Some(false), 0));
        assert_eq!(options.set_below, attr::RDONLY);
        assert_eq!(options.idmap, Some(true));
        assert!(options.shares());
        assert_eq!(parse("none", "bind").bind, Some(false));
    }

    #[test]
    fn relatime_is_not_atime_below() {
        let options = parse("bind", "relatime");
        assert_eq!((options.set, options.set_below), (0, 0));
        assert!(options.data.is_empty());
    }
}
