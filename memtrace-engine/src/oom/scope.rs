//! Decides what ran out of memory, and which cgroups an incident shows because of that.

use memtrace_common::event as wire;
use memtrace_incident::{KernelLogKill, Scope};

use super::pairing::Decision;
use crate::decode::Reading;
use crate::world::{Cgroups, Moments, ViewOf, World};

/// What ran out of memory. The id is that of the cgroup, for scopes that are a cgroup and when
/// known.
pub(super) type OomScope = (Scope, Option<u64>);

/// What ran out of memory, from the best witness: the kernel's decision, then the kernel log, then
/// the page counters at the mark. The constraint is the kernel's `enum oom_constraint`
/// (include/linux/oom.h): 0 none, 1 cpuset, 2 memory policy, 3 memcg.
pub(super) fn scope(
    mark_scope: u32,
    victim: Option<u64>,
    oom: Option<u64>,
    decision: Option<&Decision>,
    log: Option<&KernelLogKill>,
    cgroups: &Cgroups,
) -> OomScope {
    let memcg = |id: u64| if Some(id) == victim { (Scope::Cgroup, Some(id)) } else { (Scope::Ancestor, Some(id)) };
    match decision.map(|d| (d.constraint, d.oom.cgroup_id)) {
        Some((1, _)) => return (Scope::Cpuset, None),
        Some((3, Some(id))) => return memcg(id),
        Some((0 | 2, _)) => return (Scope::Global, None),
        _ => {}
    }
    let from_mark = oom.filter(|_| mark_scope == wire::SCOPE_MEMCG).map(memcg);
    let from_log = log.and_then(|l| match l.constraint.as_deref()? {
        "CONSTRAINT_CPUSET" => Some((Scope::Cpuset, None)),
        "CONSTRAINT_NONE" | "CONSTRAINT_MEMORY_POLICY" => Some((Scope::Global, None)),
        "CONSTRAINT_MEMCG" => {
            let path = l.oom_memcg.as_deref()?;
            if l.task_memcg.as_deref() == Some(path) || cgroups.path(victim).as_deref() == Some(path) {
                return Some((Scope::Cgroup, victim));
            }
            // A removed cgroup may have had the same path, so ancestors of the victim come first.
            let above = victim.map(|id| cgroups.chain(id)).unwrap_or_default();
            let above = above.into_iter().find(|id| cgroups.path(Some(*id)).as_deref() == Some(path));
            let id = above.or_else(|| cgroups.id_of_path(path));
            id.map(memcg).or(from_mark).or(Some((Scope::Ancestor, None)))
        }
        _ => None,
    });
    let unsaid = if mark_scope == wire::SCOPE_GLOBAL { Scope::Global } else { Scope::Unknown };
    from_log.or(from_mark).unwrap_or((unsaid, None))
}

/// The root of the subtree that an incident is about; `None` is the machine. When the cgroup is not
/// known it is id 0, which no cgroup has, so nothing is shown rather than the machine.
pub(super) fn tree(oom_scope: OomScope, victim: Option<u64>) -> Option<u64> {
    match oom_scope {
        (Scope::Global | Scope::Cpuset, _) => None,
        (Scope::Cgroup | Scope::Ancestor, out) => Some(out.unwrap_or(0)),
        (Scope::Unknown, _) => Some(victim.unwrap_or(0)),
    }
}

/// Counters of the cgroup that ran out of memory, from the readings at the kill. Usage that was not
/// read then stays unknown.
pub(super) fn counters(oom_scope: OomScope, marked: Reading, read: &[Reading], cgroups: &Cgroups) -> Reading {
    match oom_scope {
        (Scope::Unknown, _) => marked,
        (_, None) => Reading::default(),
        (_, Some(id)) => {
            let of_it =
                [marked].iter().chain(read).filter(|r| r.cgroup_id == Some(id)).copied().reduce(|a, b| a.or(&b));
            let last = cgroups.get(id).map(|row| row.last).unwrap_or_default();
            of_it.unwrap_or(Reading { cgroup_id: Some(id), usage: None, swap_usage: None, ..last })
        }
    }
}

/// The cgroups that an incident shows. The curve is that of an ancestor that ran out of memory,
/// when it has readings of usage, and that of the victim's cgroup otherwise.
pub(super) fn view_of(oom_scope: OomScope, victim: Option<u64>, when: Moments, world: &World) -> ViewOf {
    let (scope, out) = oom_scope;
    let has_readings = |id: &u64| world.cgroups.rows(*id, when.from_ns..=when.at_ns).any(|p| p.usage().is_some());
    let ancestor = out.filter(|id| scope == Scope::Ancestor && has_readings(id));
    ViewOf { tree: tree(oom_scope, victim), composition: out.or(victim), curve: ancestor.or(victim) }
}

#[cfg(test)]
mod tests {
    use memtrace_common::event::*;

    use super::*;
    use crate::oom::pairing::Pairing;
    use crate::test_support::{self, SEC};
    use crate::world::Need;

    const T: u64 = 1_000 * SEC;
    const OWN: u64 = 50;

    #[test]
    fn the_best_witness_decides_what_ran_out() {
        let log = |constraint: &str, oom: Option<&str>| {
            Some(KernelLogKill {
                constraint: Some(constraint.into()),
                oom_memcg: oom.map(Into::into),
                task_memcg: Some("/app".into()),
                ..KernelLogKill::default()
            })
        };
        let decided = |constraint: u32, id: u64| {
            let mut pairing = Pairing::default();
            Some(pairing.add_decision(&test_support::decision(T, 1, 2, test_support::memcg(id, 1), constraint)))
        };
        let mut cgroups = Cgroups::default();
        cgroups.learn(OWN, Some(2), Some("/app".into()), 0, Need::Named);
        cgroups.learn(2, None, Some("/".into()), 0, Need::Named);
        let cases = [
            ("own", SCOPE_MEMCG, Some(OWN), None, None, Scope::Cgroup, Some(OWN)),
            ("ancestor", SCOPE_MEMCG, Some(2), None, None, Scope::Ancestor, Some(2)),
            ("global", SCOPE_GLOBAL, None, None, None, Scope::Global, None),
            ("unknown", SCOPE_UNKNOWN, None, None, None, Scope::Unknown, None),
            ("memcg without an id", SCOPE_MEMCG, None, None, None, Scope::Unknown, None),
            ("log: cpuset", SCOPE_GLOBAL, None, None, log("CONSTRAINT_CPUSET", None), Scope::Cpuset, None),
            (
                "log overrules a reading: none",
                SCOPE_MEMCG,
                Some(OWN),
                None,
                log("CONSTRAINT_NONE", None),
                Scope::Global,
                None,
            ),
            (
                "log overrules: cpuset",
                SCOPE_MEMCG,
                Some(OWN),
                None,
                log("CONSTRAINT_CPUSET", None),
                Scope::Cpuset,
                None,
            ),
            ("log: none", SCOPE_UNKNOWN, None, None, log("CONSTRAINT_NONE", None), Scope::Global, None),
            ("log: own", SCOPE_UNKNOWN, None, None, log("CONSTRAINT_MEMCG", Some("/app")), Scope::Cgroup, Some(OWN)),
            ("log: ancestor", SCOPE_UNKNOWN, None, None, log("CONSTRAINT_MEMCG", Some("/")), Scope::Ancestor, Some(2)),
            (
                "log: ancestor nobody knows",
                SCOPE_UNKNOWN,
                None,
                None,
                log("CONSTRAINT_MEMCG", Some("/x")),
                Scope::Ancestor,
                None,
            ),
            (
                "log overrules a reading: ancestor",
                SCOPE_MEMCG,
                Some(OWN),
                None,
                log("CONSTRAINT_MEMCG", Some("/")),
                Scope::Ancestor,
                Some(2),
            ),
            (
                "log's path is not known: the reading stays",
                SCOPE_MEMCG,
                Some(OWN),
                None,
                log("CONSTRAINT_MEMCG", Some("/x")),
                Scope::Cgroup,
                Some(OWN),
            ),
            (
                "decision overrules the log",
                SCOPE_GLOBAL,
                None,
                decided(3, 2),
                log("CONSTRAINT_NONE", None),
                Scope::Ancestor,
                Some(2),
            ),
            ("decision: cpuset", SCOPE_GLOBAL, None, decided(1, UNKNOWN), None, Scope::Cpuset, None),
            ("decision: memcg", SCOPE_UNKNOWN, None, decided(3, 2), None, Scope::Ancestor, Some(2)),
            ("decision: none", SCOPE_UNKNOWN, None, decided(0, UNKNOWN), None, Scope::Global, None),
            ("decision: unknown", SCOPE_MEMCG, Some(2), decided(u32::MAX, UNKNOWN), None, Scope::Ancestor, Some(2)),
        ];
        for (name, mark, oom, decision, log, scope, id) in cases {
            let found = super::scope(mark, Some(OWN), oom, decision.as_ref(), log.as_ref(), &cgroups);
            assert_eq!(found, (scope, id), "{name}");
        }
    }
}
