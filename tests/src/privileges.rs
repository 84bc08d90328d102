//! Capabilities of processes: what one has, starting one with fewer, and what the documents say.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities,
};

use crate::programs;

/// The page that names every capability and every thread.
const PAGE: &str = include_str!("../../docs/capabilities.md");
/// Locked memory that a program without CAP_IPC_LOCK may have, bytes: less than an agent.
const LOCKED_BYTES: u64 = 8 << 20;

/// A capability of the page.
#[derive(Clone, Debug)]
pub struct Capability {
    /// With `CAP_`.
    pub name: String,
    /// Its bit.
    pub bit: u64,
    /// Whether the agent does not start without it.
    pub required: bool,
    /// What is lost without it.
    pub lost: String,
}

/// What the page says of a thread or process.
#[derive(Clone, Debug)]
pub struct Holder {
    /// Name of the thread, or command of the process.
    pub name: String,
    /// Permitted and bounding set.
    pub holds: u64,
    /// Effective set.
    pub uses: u64,
}

/// Every capability of the page.
pub fn documented() -> anyhow::Result<Vec<Capability>> {
    let capability = |[name, need, _, lost]: [&str; 4]| {
        let bare = name.strip_prefix("CAP_")?;
        let required = need == "does not start";
        Some(mask(bare).map(|bit| Capability { name: name.to_owned(), bit, required, lost: lost.to_owned() }))
    };
    let found: Vec<_> = rows().filter_map(capability).collect::<anyhow::Result<_>>()?;
    ensure!(!found.is_empty(), "the page has no table of capabilities");
    Ok(found)
}

/// Every thread and process of the page.
pub fn holders() -> anyhow::Result<Vec<Holder>> {
    let rows = rows().filter(|[_, _, holds, ..]: &[&str; 5]| *holds != "holds");
    let holder = |[name, _, holds, uses, _]: [&str; 5]| {
        Ok(Holder { name: name.to_owned(), holds: mask(holds)?, uses: mask(uses)? })
    };
    let found: Vec<_> = rows.map(holder).collect::<anyhow::Result<_>>()?;
    ensure!(!found.is_empty(), "the page has no table of threads");
    Ok(found)
}

/// Rows of tables with this many columns, with quotes of code taken off.
fn rows<const COLUMNS: usize>() -> impl Iterator<Item = [&'static str; COLUMNS]> {
    let unquoted = |cell: &'static str| cell.strip_prefix('`').and_then(|cell| cell.strip_suffix('`')).unwrap_or(cell);
    PAGE.lines().filter_map(move |line| {
        let cells = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ").map(unquoted);
        cells.collect::<Vec<_>>().try_into().ok()
    })
}

/// The bits of names without `CAP_`, separated by blanks.
fn mask(names: &str) -> anyhow::Result<u64> {
    names.split(' ').filter(|name| *name != "none").try_fold(0, |mask, name| {
        let bit = CapabilitySet::from_name(name).with_context(|| format!("no capability {name}"))?;
        Ok(mask | bit.bits())
    })
}

/// What this process may use. The bounding set is no smaller for whoever is root.
pub fn held() -> anyhow::Result<u64> {
    Ok(capabilities(None).context("failed to read capabilities")?.permitted.bits())
}

/// A field of a `status` file in /proc; `None` when it has no such field.
pub fn field(status: &str, name: &str) -> Option<String> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// A command that runs `program` with these capabilities of this process' own, at most.
pub fn command(keep: u64, program: impl AsRef<Path>) -> anyhow::Result<Command> {
    let mut command = Command::new(programs::path("oomcage")?);
    command.args(["--keep", &format!("{keep:x}"), "--"]).arg(program.as_ref());
    Ok(command)
}

/// Keeps these capabilities of this process, at most, also for the program that it becomes as root; without
/// CAP_IPC_LOCK also little locked memory.
pub fn keep(keep: u64) -> anyhow::Result<()> {
    let keep = CapabilitySet::from_bits_retain(keep);
    let held = capabilities(None).context("failed to read capabilities")?;
    clear_ambient_capability_set().context("failed to clear the ambient set")?;
    for bit in (0..64).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
        // The first number that the kernel does not know is an error.
        if !keep.contains(bit) && remove_capability_from_bounding_set(bit).is_err() {
            break;
        }
    }
    let limit = getrlimit(Resource::Memlock).maximum.map_or(LOCKED_BYTES, |most| most.min(LOCKED_BYTES));
    let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
    setrlimit(Resource::Memlock, limit).context("failed to limit locked memory")?;
    let kept = held.permitted & keep;
    let sets = CapabilitySets { permitted: kept, effective: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).context("failed to drop capabilities")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_read() {
        let documented = documented().unwrap();
        let find = |name: &str| documented.iter().find(|one| one.name == name).unwrap();
        assert!(find("CAP_BPF").required && !find("CAP_KILL").required && find("CAP_KILL").bit == 1 << 5);
        assert!(find("CAP_KILL").lost.contains("left behind"));
        let http = holders().unwrap().into_iter().find(|holder| holder.name == "http").unwrap();
        assert_eq!((http.holds, http.uses), (1 << 14, 1 << 14));
        assert_eq!(field("Name:\tx\nUid:\t1\t2\n", "Uid").as_deref(), Some("1 2"));
    }
}
