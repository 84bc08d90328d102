//! BPF programs and maps of a process, from /proc/PID/fdinfo: how often and how long programs run,
//! and how much memory is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use anyhow::Context;

/// How often and how long a program ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Runs {
    /// Calls.
    pub(crate) count: u64,
    /// Time in them, nanoseconds.
    pub(crate) ns: u64,
}

/// The BPF objects of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Run statistics by raw tracepoint; for other programs by the kind of their link.
    pub(crate) runs: BTreeMap<String, Runs>,
    /// Names of the raw tracepoints.
    pub(crate) tracepoints: BTreeSet<String>,
    /// Memory of its programs, bytes.
    pub(crate) program_bytes: u64,
    /// Memory of its maps including rings, each counted once, bytes.
    pub(crate) map_bytes: u64,
}

impl Runs {
    /// Runs since an earlier reading.
    pub(crate) fn since(self, before: Self) -> Self {
        Self { count: self.count.saturating_sub(before.count), ns: self.ns.saturating_sub(before.ns) }
    }

    /// Nanoseconds a call; `None` without calls.
    pub(crate) fn ns_per_call(self) -> Option<f64> {
        (self.count > 0).then(|| self.ns as f64 / self.count as f64)
    }
}

/// Reads all descriptors of a process.
pub(crate) fn of_process(pid: u32) -> anyhow::Result<Held> {
    let dir = format!("/proc/{pid}/fdinfo");
    let entries = std::fs::read_dir(&dir).with_context(|| format!("failed to read {dir}"))?;
    // a descriptor may be closed by now
    let texts: Vec<String> = entries.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path()).ok()).collect();
    Ok(held(&texts))
}

/// One program of this process.
pub(crate) fn own_program(descriptor: impl Display) -> anyhow::Result<Runs> {
    let path = format!("/proc/self/fdinfo/{descriptor}");
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    runs(&text).with_context(|| format!("{path} is not of a program"))
}

fn held(texts: &[String]) -> Held {
    let mut held = Held::default();
    let mut programs = BTreeMap::new();
    let mut maps = BTreeMap::new();
    for text in texts {
        let bytes = number(text, "memlock").unwrap_or(0);
        if let (Some(id), Some(runs)) = (number(text, "prog_id"), runs(text)) {
            programs.insert(id, (runs, bytes));
        } else if let Some(id) = number(text, "map_id") {
            maps.insert(id, bytes);
        }
    }
    for text in texts {
        let (Some(kind), Some(id)) = (field(text, "link_type"), number(text, "prog_id")) else { continue };
        let Some((runs, _)) = programs.get(&id) else { continue };
        let place = field(text, "tp_name").unwrap_or(kind).to_owned();
        if field(text, "tp_name").is_some() {
            held.tracepoints.insert(place.clone());
        }
        let sum = held.runs.entry(place).or_default();
        *sum = Runs { count: sum.count + runs.count, ns: sum.ns + runs.ns };
    }
    held.program_bytes = programs.values().map(|(_, bytes)| bytes).sum();
    held.map_bytes = maps.values().sum();
    held
}

fn runs(text: &str) -> Option<Runs> {
    Some(Runs { count: number(text, "run_cnt")?, ns: number(text, "run_time_ns")? })
}

fn number(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.parse().ok()
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_known_by_their_links_and_maps_count_once() {
        let program = "pos:\t0\nprog_type:\t17\nmemlock:\t4096\nprog_id:\t7\nrun_time_ns:\t500\nrun_cnt:\t10\n";
        let link = "pos:\t0\nlink_type:\traw_tracepoint\nlink_id:\t3\nprog_id:\t7\ntp_name:\trss_stat\n";
        let map = "map_type:\t27\nmemlock:\t8192\nmap_id:\t4\n";
        let texts = [program, link, map, map, "pos:\t0\nflags:\t02\n"].map(str::to_owned);
        let found = held(&texts);
        assert_eq!(found.runs.get("rss_stat"), Some(&Runs { count: 10, ns: 500 }));
        assert_eq!((found.program_bytes, found.map_bytes), (4096, 8192));
        assert!(found.tracepoints.contains("rss_stat"));
        assert_eq!(Runs { count: 10, ns: 500 }.ns_per_call(), Some(50.0));
        assert_eq!(Runs::default().ns_per_call(), None);
    }
}
