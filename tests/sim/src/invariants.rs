//! What must hold whatever happens, of what the engine says against what the model did.

use std::collections::{BTreeMap, BTreeSet};

use crate::adapter::{Cause, Incident, Kind, Out, Snapshot, Victim as Shown, early, left_out};
use crate::distort::Lost;
use crate::model::{Held, Key, Victim, World};
use crate::wire::Blind;

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) invariant: &'static str,
    pub(crate) detail: String,
}

/// Fails with the invariant's name unless the condition holds.
pub(crate) fn hold(invariant: &'static str, holds: bool, detail: impl FnOnce() -> String) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(Violation { invariant, detail: detail() }) }
}

/// A victim as an incident lists it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Listed {
    pub(crate) key: Key,
    pub(crate) killed: bool,
    pub(crate) shares_mm: bool,
}

/// What is remembered of a saved incident.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    pub(crate) id: String,
    pub(crate) kind: Kind,
    pub(crate) victims: Vec<Listed>,
    /// More were killed than are listed.
    pub(crate) left_out: bool,
    /// It was closed before its time.
    pub(crate) early: bool,
}

impl Saved {
    pub(crate) fn of(incident: &Incident) -> Self {
        let victims = incident.oom.iter().filter(|_| incident.kind == Kind::OomKill).flat_map(|oom| &oom.victims);
        let listed = |v: &Shown| Listed { key: (v.pid, v.start_boot_ns), killed: v.killed, shares_mm: v.shares_mm };
        Self {
            id: incident.id.clone(),
            kind: incident.kind,
            victims: victims.map(listed).collect(),
            left_out: left_out(incident),
            early: early(incident),
        }
    }
}

/// Everything the engine has said, as far as invariants speak of it. Grows with the run, which is bounded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Witness {
    pub(crate) saved: Vec<Saved>,
    ids: BTreeSet<String>,
    kills: Vec<(String, Key, bool)>,
    sigkills: BTreeMap<Key, (bool, Option<String>)>,
    /// Killed victims, with their incident.
    killed: BTreeMap<Key, String>,
}

impl Witness {
    /// Takes one output in; what can be checked of it at once is.
    pub(crate) fn see(&mut self, out: &Out, world: &World, lost: &Lost) -> Result<(), Violation> {
        match out {
            Out::Kill { incident, key, killed } => {
                hold(
                    "a kill is told once",
                    !self.kills.iter().rev().take(512).any(|k| k.0 == *incident && k.1 == *key),
                    || format!("{key:?} twice in {incident}"),
                )?;
                self.kills.push((incident.clone(), *key, *killed));
            }
            Out::Sigkill { key, oom, incident } => {
                hold("a SIGKILL is told once", !self.sigkills.contains_key(key), || format!("{key:?} twice"))?;
                self.sigkills.insert(*key, (*oom, incident.clone()));
            }
            Out::Save(incident) => self.saved(incident, world)?,
            Out::OnlyInLog(pid) => {
                let known = |(key, v): (&Key, &Victim)| key.0 == *pid && v.killed && !v.lost;
                let told = world.victims.iter().any(known);
                hold("no kill is only in the kernel log", !told || lost.any, || format!("pid {pid}"))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn saved(&mut self, incident: &Incident, world: &World) -> Result<(), Violation> {
        hold("incident ids are unique", self.ids.insert(incident.id.clone()), || {
            format!("{} ({:?}) twice", incident.id, incident.kind)
        })?;
        columns(incident)?;
        allocations(incident)?;
        composition(incident)?;
        unknowns(incident, world.switches.blind)?;
        let saved = Saved::of(incident);
        let distinct: BTreeSet<Key> = saved.victims.iter().map(|v| v.key).collect();
        hold("a victim is listed once", distinct.len() == saved.victims.len(), || format!("{saved:?}"))?;
        for v in &saved.victims {
            let truth = world.victims.get(&v.key);
            hold("a victim was one", truth.is_some(), || format!("{v:?} in {}", saved.id))?;
            let killed = truth.is_some_and(|t| t.killed);
            hold("a victim that is said to be killed was", killed || !v.killed, || format!("{v:?} in {}", saved.id))?;
            if v.killed {
                let other = self.killed.insert(v.key, saved.id.clone());
                hold("a kill is in one incident", other.is_none(), || {
                    format!("{:?} in {} and {}", v.key, saved.id, other.clone().unwrap_or_default())
                })?;
            }
        }
        self.saved.push(saved);
        Ok(())
    }

    /// Whether the incident of a decision was closed before its time. A record that comes later belongs to a file that
    /// is written, and no record can tell beforehand that one will come.
    pub(crate) fn closed_early(&self, decision: usize, world: &World) -> bool {
        let early = self.saved.iter().filter(|s| s.early).flat_map(|s| &s.victims);
        early.filter_map(|v| world.victims.get(&v.key)).any(|t| t.decisions.contains(&decision))
    }

    /// After a stop: nothing is open, so everything that was told is in an incident.
    pub(crate) fn stopped(&self) -> Result<(), Violation> {
        let listed: BTreeMap<(&str, Key), bool> =
            self.saved.iter().flat_map(|s| s.victims.iter().map(|v| ((s.id.as_str(), v.key), v.killed))).collect();
        for (incident, key, killed) in &self.kills {
            hold("a kill that is told belongs to a saved incident", self.ids.contains(incident), || {
                format!("{key:?} says {incident}")
            })?;
            let same = listed.get(&(incident.as_str(), *key)) == Some(killed);
            hold("a kill that is told is listed as told", same, || format!("{key:?}, killed {killed}, {incident}"))?;
        }
        hold("as many kills are told as listed", self.kills.len() == listed.len(), || {
            format!("{} told, {} listed", self.kills.len(), listed.len())
        })
    }

    /// After a stop: every victim of the model is where it must be.
    pub(crate) fn complete(&self, world: &World, strict: bool) -> Result<(), Violation> {
        let left_out = self.saved.iter().any(|s| s.left_out);
        let chosen: BTreeSet<Key> = self.saved.iter().flat_map(|s| s.victims.iter().map(|v| v.key)).collect();
        for (key, truth) in world.victims.iter().filter(|(_, t)| !t.lost && !left_out && (t.killed || t.marked)) {
            // The SIGKILL came too late. Who shares memory has no other record; one that is chosen again has a mark.
            let known = chosen.contains(key);
            if truth.late && !self.killed.contains_key(key) && (known || !truth.marked) {
                continue;
            }
            hold("every victim is in an incident", known, || format!("{key:?}: {truth:?}"))?;
            let killed = self.killed.contains_key(key);
            hold("every kill is in an incident as one", killed == truth.killed, || format!("{key:?}: {truth:?}"))?;
            let others = world.others.contains(key);
            let told = self.sigkills.get(key).is_some_and(|(oom, id)| *oom && id.as_ref() == self.killed.get(key));
            hold("a SIGKILL of the OOM killer is told as one", told || others || !truth.killed, || {
                format!("{key:?}: {truth:?}, told {:?}", self.sigkills.get(key))
            })?;
        }
        if strict { self.decisions(world) } else { Ok(()) }
    }

    /// One decision, one incident.
    fn decisions(&self, world: &World) -> Result<(), Violation> {
        let mut of: BTreeMap<usize, &str> = BTreeMap::new();
        let mut used: BTreeMap<&str, usize> = BTreeMap::new();
        // Who was chosen again while dying belongs to several.
        let once = world.victims.iter().filter(|(_, t)| t.killed && t.decisions.len() == 1);
        for (key, truth) in once {
            let (Some(decision), Some(id)) = (truth.decisions.first(), self.killed.get(key)) else { continue };
            let other = of.insert(*decision, id).filter(|other| other != id);
            hold("victims of one decision are in one incident", other.is_none(), || {
                format!("{key:?} in {id}, others in {other:?}: {truth:?}")
            })?;
            let other = used.insert(id, *decision).filter(|other| other != decision);
            if !world.switches.decisions {
                // Then two of one trigger in a second cannot be told apart.
                continue;
            }
            hold("victims of two decisions are in two incidents", other.is_none(), || {
                format!("{key:?} in {id}: {truth:?} and decision {other:?}")
            })?;
        }
        Ok(())
    }
}

fn columns(incident: &Incident) -> Result<(), Violation> {
    let c = &incident.timeline.columns;
    let n = c.boot_ns.len();
    let lengths = [
        c.usage_bytes.len(),
        c.limit_bytes.len(),
        c.watermark_bytes.len(),
        c.anon_bytes.len(),
        c.file_bytes.len(),
        c.shmem_bytes.len(),
        c.swap_bytes.len(),
        c.swap_usage_bytes.len(),
        c.swap_limit_bytes.len(),
    ];
    hold("columns are of one length", lengths.iter().all(|l| *l == n), || format!("{}: {lengths:?}", incident.id))?;
    hold("a curve goes forward", c.boot_ns.is_sorted(), || incident.id.clone())?;
    let there = incident.kind != Kind::OomKill || c.boot_ns.contains(&incident.at.boot_ns);
    hold("a kill is on its curve", there, || incident.id.clone())
}

fn allocations(incident: &Incident) -> Result<(), Violation> {
    let Some(a) = &incident.allocations else { return Ok(()) };
    let without = a.unattributed_bytes();
    let (mut all, mut with) = (0u64, 0u64);
    for (_, path, weight) in a.samples.rows() {
        let path = path.map(|at| usize::try_from(at).ok().and_then(|at| incident.allocation_paths.get(at)));
        hold("a sample's path is there", path != Some(None), || incident.id.clone())?;
        let touch = path.flatten().is_none_or(|p| p.cause == Cause::Touch);
        all += if touch { weight } else { 0 };
        with += if touch && path.is_some() { weight } else { 0 };
    }
    let sums = (a.growth_bytes, a.attributed_bytes) == (all, with) && all == with + without;
    hold("growth adds up", sums, || {
        format!(
            "{}: says {} of {}, {without} without; samples {with} of {all}",
            incident.id, a.attributed_bytes, a.growth_bytes
        )
    })?;
    let paths: u64 = incident.allocation_paths.iter().map(|p| p.weight_bytes).sum();
    hold("paths weigh what their samples do", paths >= with, || format!("{}: {paths} of {with}", incident.id))
}

fn composition(incident: &Incident) -> Result<(), Violation> {
    let c = &incident.composition;
    let (Some(anon), Some(shmem), Some(rest)) = (c.anon_bytes, c.shmem_bytes, c.unattributed_bytes) else {
        return Ok(());
    };
    if incident.kind == Kind::Recording || incident.kind == Kind::Spike {
        return Ok(());
    }
    let out = incident.oom.as_ref().and_then(|oom| oom.oom_cgroup.as_ref());
    let usages = [incident.cgroup.usage_bytes, out.and_then(|c| c.usage_bytes)];
    let fits = |usage: u64| i64::try_from(usage.saturating_sub(anon + shmem)).unwrap_or(i64::MAX) == rest;
    hold("composition adds up to usage", usages.into_iter().flatten().any(fits), || {
        format!("{}: anon {anon}, shmem {shmem}, rest {rest} of {usages:?}", incident.id)
    })
}

/// What no record could tell is not told.
fn unknowns(incident: &Incident, blind: Blind) -> Result<(), Violation> {
    let out = incident.oom.iter().flat_map(|oom| oom.oom_cgroup.iter().chain(oom.trigger_cgroup.iter()));
    for c in std::iter::once(&incident.cgroup).chain(out) {
        let told = [
            (Blind::FAILCNT, c.failcnt.is_some()),
            (Blind::SWAP, c.swap_usage_bytes.is_some() || c.swap_limit_bytes.is_some()),
            (Blind::HIGH, c.high_bytes.is_some()),
            (Blind::WATERMARK, c.peak_bytes.is_some() && incident.kind != Kind::Recording),
            (Blind::USAGE, c.usage_bytes.is_some()),
        ];
        let wrong = told.iter().find(|(field, told)| blind.to(*field) && *told);
        hold("unknown counters are not shown", wrong.is_none(), || format!("{}: {wrong:?} of {c:?}", incident.id))?;
    }
    for v in incident.oom.iter().flat_map(|oom| &oom.victims).filter(|v| !v.shares_mm) {
        let rss = v.anon_bytes.or(v.file_bytes).or(v.shmem_bytes).or(v.swap_bytes);
        let told = [
            (Blind::VICTIM_RSS, rss.is_some()),
            (Blind::PAGETABLES, v.pagetable_bytes.is_some()),
            (Blind::OOM_SCORE, v.oom_score_adj.is_some()),
        ];
        let wrong = told.iter().find(|(field, told)| blind.to(*field) && *told);
        hold("unknown values of a victim are not shown", wrong.is_none(), || format!("{}: {v:?}", incident.id))?;
    }
    Ok(())
}

/// Once all has arrived and ended: the engine believes what it was told.
pub(crate) fn sums(snapshot: &Snapshot, world: &World, trees: bool) -> Result<(), Violation> {
    let expected: BTreeMap<u32, (u64, Held)> = world
        .processes
        .values()
        .filter_map(|p| Some((p.pid, (p.start_ns, world.spaces.get(&p.space)?.told?.held))))
        .collect();
    for p in &snapshot.processes {
        let truth = expected.get(&p.pid).filter(|(start, _)| p.start_boot_ns.is_none_or(|s| s == *start));
        let shown = Held { anon: p.anon_bytes, file: p.file_bytes, shmem: p.shmem_bytes, swap: p.swap_bytes };
        hold("a process holds what was told", truth.map(|t| t.1) == Some(shown), || {
            format!("pid {} shows {shown:?}, told {truth:?}", p.pid)
        })?;
    }
    let shown: BTreeSet<u32> = snapshot.processes.iter().map(|p| p.pid).collect();
    let missing = expected.keys().find(|pid| !shown.contains(pid));
    hold("every process is shown", missing.is_none(), || {
        format!("pid {missing:?}: {:?}", missing.map(|p| expected.get(p)))
    })?;
    let told = world.told_sums();
    for c in snapshot.cgroups.iter().filter(|_| trees) {
        let truth = told.get(&c.id).copied().unwrap_or_default();
        let shown = Held { anon: c.anon_bytes, file: c.file_bytes, shmem: c.shmem_bytes, swap: c.swap_bytes };
        hold("a cgroup holds what its processes do", truth == shown, || {
            format!("cgroup {} ({:?}) shows {shown:?}, told {truth:?}", c.id, c.path)
        })?;
    }
    Ok(())
}
