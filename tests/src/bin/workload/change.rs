//! Processes that change while they grow: shared address spaces, forked children, new programs,
//! other cgroups.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use memtrace_tests::cage;
use serde_json::json;

use crate::{memory, raw};

/// Two processes with one address space. The first grows until it is done or both are killed.
pub(crate) fn share_mm(mib: usize) -> anyhow::Result<()> {
    let sharer = raw::sharer()?;
    crate::say("sharer", &json!({ "child": sharer }))?;
    let held = memory::touched(mib);
    crate::say("ready", &json!({ "anon_mib": mib }))?;
    crate::wait_for_end_of_stdin()?;
    drop(held);
    Ok(())
}

/// A child that forks without exec, renames itself and grows. Its parent reports how it ended.
pub(crate) fn fork_only(mib: usize) -> anyhow::Result<()> {
    let child = raw::fork()?;
    if child == 0 {
        std::fs::write("/proc/self/comm", "fork-only-child").context("failed to set the process name")?;
        crate::say("start", &json!({}))?;
        let held = memory::touched(mib);
        drop(held);
        std::process::exit(0);
    }
    crate::say("child", &json!({ "child": child }))?;
    let status = raw::wait(child)?;
    crate::say("child_exit", &json!({ "child": child, "status": status }))
}

/// Execs another program while growing: the same process with another address space.
pub(crate) fn exec_grow(first_mib: usize, mib: usize) -> anyhow::Result<()> {
    let held = memory::touched(first_mib);
    crate::say("grown", &json!({ "anon_mib": first_mib }))?;
    let own = std::env::current_exe().context("failed to find this program")?;
    let error = Command::new(own).args(["member", "--comm", "exec-after", "--mib", &mib.to_string()]).exec();
    drop(held);
    Err(error).context("failed to become another program")
}

/// Goes through cgroups and takes some memory in each.
pub(crate) fn wander(prefix: &str, numbers: std::ops::Range<usize>) -> anyhow::Result<()> {
    for number in numbers {
        cage::enter(Path::new(&format!("{prefix}{number}")))?;
        drop(memory::touched(2));
    }
    Ok(())
}

/// Moves into another cgroup while growing, and makes that the root of its cgroup namespace.
pub(crate) fn move_grow(first_mib: usize, to: &Path, mib: usize) -> anyhow::Result<()> {
    let before = memory::touched(first_mib);
    crate::say("grown", &json!({ "anon_mib": first_mib }))?;
    cage::enter(to)?;
    raw::own_cgroup_namespace()?;
    crate::say("moved", &json!({}))?;
    let after = memory::touched(mib);
    crate::say("ready", &json!({ "anon_mib": first_mib + mib }))?;
    crate::wait_for_end_of_stdin()?;
    drop((before, after));
    Ok(())
}
