//! Who a container's first process runs as: what the pod asks for, what the image says, and the
//! image's own passwd and group files.
//!
//! Those files are a stranger's: they are bytes, read line by line, and a line that makes no
//! sense is passed over.
//!
//! Source: CRI `LinuxContainerSecurityContext`; passwd(5), group(5); KEP-3619 on policies.

use crate::container_spec::{GroupsPolicy, RunAs};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// Most groups a process can have. Source: NGROUPS_MAX in linux/limits.h.
const MOST_GROUPS: usize = 65_536;

/// Not somebody who can be run as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    #[error("a group was asked for without a user: {0}")]
    GroupWithoutUser(u32),
    #[error("there is no user {0:?} in the image's /etc/passwd")]
    NoUser(String),
    #[error("there is no group {0:?} in the image's /etc/group")]
    NoGroup(String),
    #[error("{0:?} is not a user, as in \"user\", \"1000\", \"user:group\" or \"1000:1000\"")]
    BadUser(String),
    #[error("{0} groups are more than a process can have ({MOST_GROUPS})")]
    TooManyGroups(usize),
}

/// Who a process is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Every group, the primary one first, none twice.
    pub groups: Vec<u32>,
    /// The home directory the image's passwd names; "/" stands for one that is not known.
    pub home: OsString,
}

/// One line of passwd that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct User<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// One line of group that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

/// Who the process is. `passwd` and `group` are the files' contents, `image_user` is the image
/// config's `User`, empty for root.
///
/// A user ID that passwd does not know has group 0; a user name has to be there. With `Merge`
/// the groups that list the user follow the primary one, those of `supplemental` come last; with
/// `Strict` the image's are left out.
///
/// # Errors
/// A group without a user, a name the image does not have, what is no user at all.
pub fn resolve(
    passwd: Option<&[u8]>,
    group: Option<&[u8]>,
    image_user: &str,
    run_as: &RunAs,
    supplemental: &[u32],
    policy: GroupsPolicy,
) -> Result<Identity, UserError> {
    let users = || {
        passwd
            .unwrap_or_default()
            .split(|b| *b == b'\n')
            .filter_map(parse_user)
    };
    let groups = || {
        group
            .unwrap_or_default()
            .split(|b| *b == b'\n')
            .filter_map(parse_group)
    };

    let asked = match (run_as.uid, run_as.username.as_str(), run_as.gid) {
        (Some(uid), _, gid) => (Who::Id(uid), gid.map(Who::Id)),
        (None, "", Some(gid)) => return Err(UserError::GroupWithoutUser(gid)),
        (None, "", None) => parse_image_user(image_user)?,
        (None, name, gid) => (Who::parse(name)?, gid.map(Who::Id)),
    };
    let (user, uid) = match asked.0 {
        Who::Id(uid) => (users().find(|user| user.uid == uid), uid),
        Who::Name(name) => {
            let user = users().find(|user| user.name == name.as_bytes());
            let user = user.ok_or_else(|| UserError::NoUser(shown(name)))?;
            (Some(user), user.uid)
        }
    };
    let gid = match asked.1 {
        Some(Who::Id(gid)) => gid,
        Some(Who::Name(name)) => groups()
            .find(|group| group.name == name.as_bytes())
            .map(|group| group.gid)
            .ok_or_else(|| UserError::NoGroup(shown(name)))?,
        None => user.map_or(0, |user| user.gid),
    };

    let mut all = vec![gid];
    let mut seen = std::collections::HashSet::from([gid]);
    let mut add = |gid| {
        if seen.insert(gid) {
            all.push(gid);
        }
    };
    if let (GroupsPolicy::Merge, Some(user)) = (policy, user) {
        groups()
            .filter(|group| group.lists(user.name))
            .for_each(|group| add(group.gid));
    }
    supplemental.iter().copied().for_each(add);
    if all.len() > MOST_GROUPS {
        return Err(UserError::TooManyGroups(all.len()));
    }
    let home = user
        .map(|user| user.home)
        .filter(|home| home.starts_with(b"/"))
        .unwrap_or(b"/");
    Ok(Identity {
        uid,
        gid,
        groups: all,
        home: OsString::from_vec(home.to_vec()),
    })
}

/// A user or a group, by number or by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who<'a> {
    Id(u32),
    Name(&'a str),
}

impl<'a> Who<'a> {
    /// What is all digits is a number, as with containerd.
    fn parse(text: &'a str) -> Result<Self, UserError> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            let id = number(text.as_bytes()).ok_or_else(|| UserError::BadUser(shown(text)))?;
            return Ok(Self::Id(id));
        }
        Ok(Self::Name(text))
    }
}

fn parse_image_user(text: &str) -> Result<(Who<'_>, Option<Who<'_>>), UserError> {
    if text.is_empty() {
        return Ok((Who::Id(0), None));
    }
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    if user.is_empty() || group.is_some_and(|group| group.contains(':')) {
        return Err(UserError::BadUser(shown(text)));
    }
    Ok((Who::parse(user)?, group.map(Who::parse).transpose()?))
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

/// A user or group ID; the last u32 is none, it says "leave it" to the kernel.
fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text)
        .ok()?
        .parse()
        .ok()
        .filter(|id| *id != u32::MAX)
}

/// name:password:uid:gid:comment:home:shell. What follows the gid may be missing.
fn parse_user(line: &[u8]) -> Option<User<'_>> {
    let mut fields = trim(line).split(|b| *b == b':');
    let name = fields.next().filter(|name| good_name(name))?;
    let uid = number(fields.nth(1)?)?;
    let gid = number(fields.next()?)?;
    Some(User {
        name,
        uid,
        gid,
        home: fields.nth(1).unwrap_or_default(),
    })
}

/// name:password:gid:members. The members may be missing.
fn parse_group(line: &[u8]) -> Option<Group<'_>> {
    let mut fields = trim(line).split(|b| *b == b':');
    let name = fields.next().filter(|name| good_name(name))?;
    let gid = number(fields.nth(1)?)?;
    Some(Group {
        name,
        gid,
        members: fields.next().unwrap_or_default(),
    })
}

fn trim(line: &[u8]) -> &[u8] {
    line.trim_ascii()
}

/// Neither empty, nor a comment, nor a NIS entry.
fn good_name(name: &[u8]) -> bool {
    name.first()
        .is_some_and(|first| !matches!(first, b'#' | b'+' | b'-'))
}

impl Group<'_> {
    fn lists(&self, user: &[u8]) -> bool {
        self.members
            .split(|b| *b == b',')
            .any(|member| member.trim_ascii() == user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # a comment\n+nis::::::\nbroken\nbad:x:-1:7::/:\n\
        web:x:1000:1001:Web:/srv/web:/bin/sh\nshort:x:7:8\nweird\xff:x:9:9::/w:\n";
    const GROUP: &[u8] = b"root:x:0:root\nbin:x:1:root,daemon\nweb:x:1001:\n\
        docker:x:998:web\nstaff:x:50:other, web\nbroken:x:\nagain:x:998:web\n";

    fn run(image_user: &str, run_as: RunAs) -> Result<Identity, UserError> {
        resolve(
            Some(PASSWD),
            Some(GROUP),
            image_user,
            &run_as,
            &[],
            GroupsPolicy::Merge,
        )
    }

    fn ids(identity: Result<Identity, UserError>) -> (u32, u32, Vec<u32>) {
        let identity = identity.unwrap();
        (identity.uid, identity.gid, identity.groups)
    }

    fn nobody() -> RunAs {
        RunAs::default()
    }

    #[test]
    fn the_image_says_who() {
        assert_eq!(ids(run("", nobody())), (0, 0, vec![0, 1]));
        assert_eq!(ids(run("web", nobody())), (1000, 1001, vec![1001, 998, 50]));
        assert_eq!(
            ids(run("1000", nobody())),
            (1000, 1001, vec![1001, 998, 50])
        );
        assert_eq!(ids(run("web:staff", nobody())), (1000, 50, vec![50, 998]));
        assert_eq!(ids(run("web:5", nobody())), (1000, 5, vec![5, 998, 50]));
        assert_eq!(ids(run("web:", nobody())).1, 1001);
        assert_eq!(run("web", nobody()).unwrap().home, "/srv/web");
    }

    #[test]
    fn a_number_the_image_does_not_know_has_group_0() {
        assert_eq!(ids(run("4242", nobody())), (4242, 0, vec![0]));
        assert_eq!(run("4242", nobody()).unwrap().home, "/");
        assert_eq!(ids(run("4242:17", nobody())), (4242, 17, vec![17]));
        let identity = resolve(
            None,
            None,
            "12:13",
            &nobody(),
            &[13, 14, 14],
            GroupsPolicy::Merge,
        );
        assert_eq!(ids(identity), (12, 13, vec![13, 14]));
    }

    #[test]
    fn the_pod_overrides_the_image() {
        let run_as = RunAs {
            uid: Some(1000),
            ..nobody()
        };
        assert_eq!(
            ids(run("root:bin", run_as)),
            (1000, 1001, vec![1001, 998, 50])
        );
        let run_as = RunAs {
            uid: Some(5),
            gid: Some(6),
            username: "web".to_owned(),
        };
        assert_eq!(ids(run("web", run_as)), (5, 6, vec![6]));
        let run_as = RunAs {
            username: "short".to_owned(),
            ..nobody()
        };
        assert_eq!(ids(run("", run_as)), (7, 8, vec![8]));
    }

    #[test]
    fn strict_leaves_the_images_groups_out() {
        let identity = resolve(
            Some(PASSWD),
            Some(GROUP),
            "web",
            &nobody(),
            &[7, 1001, 3],
            GroupsPolicy::Strict,
        );
        assert_eq!(ids(identity), (1000, 1001, vec![1001, 7, 3]));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let group_alone = RunAs {
            gid: Some(5),
            ..nobody()
        };
        assert_eq!(run("web", group_alone), Err(UserError::GroupWithoutUser(5)));
        assert_eq!(
            run("bad", nobody()),
            Err(UserError::NoUser("bad".to_owned()))
        );
        assert_eq!(
            run("web:nope", nobody()),
            Err(UserError::NoGroup("nope".to_owned()))
        );
        for bad in [":web", "a:b:c", "4294967295", "99999999999", ":"] {
            assert!(
                matches!(run(bad, nobody()), Err(UserError::BadUser(_))),
                "{bad}"
            );
        }
        let many: Vec<u32> = (0..70_000).collect();
        let identity = resolve(None, None, "", &nobody(), &many, GroupsPolicy::Strict);
        assert_eq!(identity, Err(UserError::TooManyGroups(70_000)));
    }

    proptest! {
        #[test]
        fn no_file_makes_it_panic(
            passwd in proptest::collection::vec(any::<u8>(), 0..400),
            group in "([a-c:,0-9\n+#-]|\\PC){0,200}",
            user in "[a-c0-9:]{0,12}",
        ) {
            let _ = resolve(
                Some(&passwd),
                Some(group.as_bytes()),
                &user,
                &nobody(),
                &[1],
                GroupsPolicy::Merge,
            );
            let _ = resolve(
                Some(group.as_bytes()),
                Some(&passwd),
                &user,
                &nobody(),
                &[],
                GroupsPolicy::Merge,
            );
        }
    }
}
