//! The user who called sudo. `record` runs its command and writes its file with the rights of that user.

use std::ffi::OsString;

use anyhow::Context;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::error::CommandError;

/// Most supplementary groups; the kernel takes as many (NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;

/// The user on whose behalf root runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invoker {
    uid: u32,
    gid: u32,
    /// Every group of the user, `gid` first.
    groups: Vec<u32>,
    /// Name and home, where the password file has them.
    user: Option<(String, String)>,
}

impl Invoker {
    /// The user who called sudo; `None` when nobody did, or this is not root.
    ///
    /// Fails when only one of SUDO_UID and SUDO_GID is set, or one is not an id: a command meant for a user must not
    /// run as root.
    pub fn find() -> Result<Option<Self>, CommandError> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let Some((uid, gid)) = ids(std::env::var_os("SUDO_UID"), std::env::var_os("SUDO_GID"))? else {
            return Ok(None);
        };
        let read = |path| std::fs::read(path).map(|text| String::from_utf8_lossy(&text).into_owned());
        let user = user(&read("/etc/passwd").unwrap_or_default(), uid);
        let name = user.as_ref().map(|(name, _)| name.as_str());
        let groups = groups(&read("/etc/group").unwrap_or_default(), name, gid);
        Ok(Some(Self { uid, gid, groups, user }))
    }

    /// Name and home directory.
    pub fn user(&self) -> Option<(&str, &str)> {
        self.user.as_ref().map(|(name, home)| (name.as_str(), home.as_str()))
    }

    /// Runs `question` with the rights of this user, in a thread of its own.
    pub fn run_as_user<T: Send>(&self, question: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let asked = || {
            self.become_user()?;
            Ok(question())
        };
        std::thread::scope(|scope| scope.spawn(asked).join())
            .unwrap_or_else(|_| Err(anyhow::anyhow!("failed to run with the rights of user {}", self.uid)))
    }

    /// User id, from SUDO_UID.
    pub const fn uid(&self) -> u32 {
        self.uid
    }

    /// Makes the calling thread run as this user, with the user's groups, for good. Other threads are not changed.
    pub fn become_user(&self) -> anyhow::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let groups: Vec<Gid> = self.groups.iter().copied().map(Gid::from_raw).collect();
        let failed = || format!("failed to become user {} of group {}", self.uid, self.gid);
        // The user id last: it is what allows the other two.
        set_thread_groups(&groups).with_context(failed)?;
        set_thread_res_gid(gid, gid, gid).with_context(failed)?;
        set_thread_res_uid(uid, uid, uid).with_context(failed)
    }
}

/// The user and group id that sudo left in the environment.
fn ids(uid: Option<OsString>, gid: Option<OsString>) -> Result<Option<(u32, u32)>, CommandError> {
    if uid.is_none() && gid.is_none() {
        return Ok(None);
    }
    let id = |name: &str, value: Option<OsString>| {
        let parsed = value.as_ref().and_then(|text| text.to_str()?.parse::<u32>().ok());
        // (uid_t)-1 means "do not change" to the kernel.
        parsed.filter(|id| *id != u32::MAX).ok_or_else(|| {
            let found = value.map_or_else(|| "not set".to_owned(), |text| format!("{text:?}"));
            CommandError::Usage(format!(
                "{name} is {found}, which is not an id, so the user who called sudo is unknown; \
                 unset SUDO_UID and SUDO_GID to run as root"
            ))
        })
    };
    Ok(Some((id("SUDO_UID", uid)?, id("SUDO_GID", gid)?)))
}

/// Name and home of a user, from the text of the password file.
fn user(passwd: &str, uid: u32) -> Option<(String, String)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _, id) = (fields.next()?, fields.next()?, fields.next()?);
        (id.parse() == Ok(uid) && !name.is_empty()).then_some(())?;
        Some((name.to_owned(), fields.nth(2)?.to_owned()))
    })
}

/// `gid` and the groups that list the user, from the text of the group file.
fn groups(group: &str, name: Option<&str>, gid: u32) -> Vec<u32> {
    let mut found = vec![gid];
    let listed = group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (id, members) = (fields.nth(2)?, fields.next()?);
        let id = id.parse::<u32>().ok().filter(|id| *id != u32::MAX)?;
        members.split(',').any(|member| Some(member.trim()) == name).then_some(id)
    });
    for id in listed {
        if !found.contains(&id) && found.len() < MAX_GROUPS {
            found.push(id);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_an_answer_is_refused() {
        let ids = |uid: Option<&str>, gid: Option<&str>| ids(uid.map(Into::into), gid.map(Into::into));
        assert_eq!(ids(None, None).unwrap(), None);
        assert_eq!(ids(Some("1000"), Some("100")).unwrap(), Some((1000, 100)));
        for (uid, gid, named) in [
            (Some("1000"), None, "SUDO_GID is not set"),
            (None, Some("100"), "SUDO_UID is not set"),
            (Some(""), Some("100"), "SUDO_UID is \"\""),
            (Some("root"), Some("100"), "SUDO_UID is \"root\""),
            (Some("1000"), Some("-1"), "SUDO_GID is \"-1\""),
            (Some("4294967295"), Some("100"), "SUDO_UID is \"4294967295\""),
        ] {
            let error = ids(uid, gid).unwrap_err();
            assert!(matches!(error, CommandError::Usage(_)) && error.to_string().starts_with(named), "{error}");
        }
    }

    #[test]
    fn groups_are_those_that_list_the_user() {
        let group = "root:x:0:\nadm:x:4:syslog,ann\nann:x:1000:\ndocker:x:999: ann ,bob\nannex:x:7:annex\n\
                     broken\nbad:x:y:ann\nnone:x:4294967295:ann\nagain:x:1000:ann\n";
        assert_eq!(groups(group, Some("ann"), 1000), [1000, 4, 999]);
        assert_eq!(groups(group, None, 1000), [1000], "an empty member list is nobody's");
        assert_eq!(groups("", Some("ann"), 5), [5]);
        let passwd = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000:Ann:/home/ann:/bin/sh\n";
        assert_eq!(user(passwd, 1000), Some(("ann".into(), "/home/ann".into())));
        assert_eq!(user(passwd, 1), None);
        assert_eq!(user(":x:5:5:::", 5), None, "no name is not the name of an empty list's member");
    }
}
