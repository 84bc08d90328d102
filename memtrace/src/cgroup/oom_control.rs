//! memory.oom_control: whether the OOM killer is off, and whether tasks wait for memory. Version 1 only: version 2 has
//! no way to turn it off.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::files::CgroupDir;

/// Bytes that are read: three lines of a name and a number.
const CONTROL_BYTES: usize = 256;

/// The file of one cgroup, open.
#[derive(Debug)]
pub(super) struct ControlFile {
    dir: CgroupDir,
    file: File,
}

/// What it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OomControl {
    pub(super) kill_disabled: bool,
    pub(super) under_oom: bool,
}

impl ControlFile {
    /// That of the cgroup with this directory; `None` where there is none.
    pub(super) fn open(dir: &CgroupDir) -> Option<Self> {
        let file = dir.file("memory.oom_control")?;
        Some(Self { dir: dir.try_clone()?, file })
    }

    /// The directory that it is in.
    pub(super) const fn dir(&self) -> &CgroupDir {
        &self.dir
    }

    /// What it says now; `None` when the cgroup is gone (fs/kernfs/file.c, ENODEV) or it says something else.
    pub(super) fn read(&self) -> Option<OomControl> {
        let mut text = [0; CONTROL_BYTES];
        let bytes = self.file.read_at(&mut text, 0).ok()?;
        parse(std::str::from_utf8(text.get(..bytes)?).ok()?)
    }
}

fn parse(text: &str) -> Option<OomControl> {
    let flag = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        value.trim().parse::<u64>().ok().map(|value| value != 0)
    };
    Some(OomControl { kill_disabled: flag("oom_kill_disable")?, under_oom: flag("under_oom")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read() {
        let control = |kill_disabled, under_oom| Some(OomControl { kill_disabled, under_oom });
        assert_eq!(parse("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), control(false, false));
        assert_eq!(parse("oom_kill_disable 1\nunder_oom 1\n"), control(true, true));
        for text in ["", "oom_kill_disable 1\n", "under_oom x\noom_kill_disable 1", "oom_kill_disabled 1\nunder_oom 1"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
