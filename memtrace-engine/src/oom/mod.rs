//! OOM kills, from the kernel's decision to the closed incident, and the senders of all SIGKILLs.
//!
//! A kill arrives in pieces: a decision, a SIGKILL, a mark of the victim, lines of the kernel log,
//! and the victim's exit, in any order. [`pairing`] joins them. [`open_incident`] is the incident
//! until its window is over. [`mod@scope`] decides what ran out of memory. [`kernel_log`] is the second
//! witness. [`sigkills`] writes the sender of each SIGKILL to its ledger.

use memtrace_common::event as wire;
use memtrace_incident::{KillEntry, Kind, Loss, Oom as OomFacts};

use crate::build::BuildContext;
use crate::clock::Identity;
use crate::decode::Reading;
use crate::input::KernelLogLine;
use crate::output::{Finding, Out, Output};
use crate::run::Run;
use crate::world::{Moments, ProcessKey, View, World};

mod incident;
mod kernel_log;
mod kill_lines;
mod open_incident;
mod pairing;
mod recent;
mod scope;
mod sender_rates;
mod sigkills;
#[cfg(test)]
mod tests;

use kernel_log::KernelLog;
use kill_lines::KillLines;
pub(crate) use open_incident::OPEN_CAP;
use open_incident::OpenIncident;
use pairing::{Decision, KernelKill, OpenVictim, PAIR_NS, Pairing, Verified, marked, process, sharer};
use recent::RecentProcesses;
use scope::{counters, scope, view_of};
use sigkills::Sigkills;

/// State of all kills.
#[derive(Clone, Debug, Default)]
pub(crate) struct OomKills {
    /// Oldest first. Cap: [`OPEN_CAP`].
    open: Vec<OpenIncident>,
    pairing: Pairing,
    sigkills: Sigkills,
    lines: KillLines,
    log: KernelLog,
    /// Processes that were reported as killed, so that none is in two incidents.
    killed: RecentProcesses,
    /// Whether [`OomKills::cgroups`] may have changed since [`OomKills::take_changed`].
    changed: bool,
}

impl OomKills {
    /// SIGKILL was sent. One from the kernel waits for its mark, unless the mark came first.
    pub(crate) fn kill(&mut self, r: &wire::Kill, world: &World, run: &mut Run) {
        self.sigkills.sent_by(r, world, run);
        if r.sender_code != wire::SENDER_KERNEL {
            return;
        }
        let kill = KernelKill::from(r);
        let (key, ns) = (kill.target(), kill.boot_ns);
        if self.killed.contains(&key) {
            return;
        }
        for open in &mut self.open {
            let first = open.victims.first().map(OpenVictim::key) == Some(key) && open.id.is_none();
            let decided = open.decision.map(|decision| decision.boot_ns);
            let Some(v) = open.victims.iter_mut().find(|v| v.key() == key) else { continue };
            let of_mark = v.mark.is_some_and(|mark| kill.is_of(&mark, decided));
            if v.kill_ns.is_none() && of_mark && !v.reported {
                v.kill_ns = Some(ns);
                v.victim.killed = true;
                v.victim.at_boot_ns = ns;
                if first {
                    open.at_ns = ns;
                }
            }
            if of_mark || v.mark.is_none() {
                return;
            }
        }
        if self.pairing.add_kill(kill) {
            run.losses.count(Loss::KillsNotPaired, 1);
        }
    }

    /// The OOM killer chose a victim.
    pub(crate) fn decision(&mut self, r: &wire::OomDecision, world: &World, run: &Run) {
        let decision = self.pairing.add_decision(r);
        let late = |o: &&mut OpenIncident| {
            o.decision.is_none()
                && o.trigger == decision.trigger
                && o.at_ns >= decision.boot_ns
                && o.at_ns - decision.boot_ns <= PAIR_NS
                && o.victims.first().is_none_or(|victim| decision.fits(victim))
        };
        if let Some(open) = self.open.iter_mut().find(late) {
            open.decision = Some(decision);
            self.refine(world, run);
        }
    }

    /// The OOM killer marked a victim. The mark joins an open incident or opens one. The readings
    /// of cgroups in the mark go onto their curves after this, because the view has to end before
    /// them.
    pub(crate) fn mark(&mut self, m: &wire::OomVictim, context: &BuildContext<'_>, out: &mut Out) {
        let key = (m.victim.tgid, m.victim.start_boot_ns);
        let verified = self.pairing.verify(m, context.run.settings.kills_seen);
        self.forget_later_mark(key, m.header.boot_ns);
        let open = self.open.iter_mut().any(|o| o.victim(key).is_some());
        // It is dying of an earlier kill, whose incident is closed.
        let again = !open && self.killed.contains(&key);
        let victim = marked(m, if again { Verified::default() } else { verified });
        self.log.hook_saw(m.victim.tgid, m.victim.tid, victim.victim.at_boot_ns);
        // One that is reported as only chosen, while it was dying, may be killed by another decision.
        let same = |known: &&mut OpenVictim| known.victim.killed || !known.reported || !verified.killed;
        if let Some(known) = self.open.iter_mut().filter_map(|o| o.victim(key)).find(same) {
            if known.mark.is_none() {
                let reported = known.reported;
                *known = OpenVictim { reported, kill_ns: known.kill_ns.or(victim.kill_ns), ..victim };
                known.victim.killed |= reported;
                return;
            }
            if known.kill_ns.is_none() && !known.reported {
                known.kill_ns = victim.kill_ns;
                known.victim.killed = victim.victim.killed;
            }
            return;
        }
        let decision = self.pairing.decision((&m.trigger).into(), m.header.boot_ns).filter(|d| d.fits(&victim));
        match self.open.iter_mut().find(|o| o.joins(m, &victim, decision)) {
            Some(open) => {
                open.group |= m.flags & wire::VICTIM_GROUP != 0;
                open.decision = open.decision.or(decision);
                open.add(victim);
            }
            None => self.open_incident(m, victim, decision, context, out),
        }
        self.changed = true;
    }

    /// A process that is dying marks itself when it runs out of memory again, and that record may
    /// come before that of the mark by which it was chosen. Nothing is reported of it so far.
    fn forget_later_mark(&mut self, victim: ProcessKey, mark_ns: u64) {
        let later = |o: &OpenIncident| {
            let alone = o.id.is_none() && o.victims.len() == 1;
            alone && o.victims.iter().any(|v| v.key() == victim && v.marked_ns().is_some_and(|ns| ns > mark_ns))
        };
        if let Some(at) = self.open.iter().position(later) {
            let forgotten = self.open.remove(at);
            if !forgotten.stack.is_empty() {
                self.pairing.store_stack(victim, forgotten.stack);
            }
        }
    }

    fn open_incident(
        &mut self,
        m: &wire::OomVictim,
        victim: OpenVictim,
        decision: Option<Decision>,
        context: &BuildContext<'_>,
        out: &mut Out,
    ) {
        if self.open.len() >= OPEN_CAP {
            for kill in self.pairing.waiting() {
                self.add_sharer(&kill, context.world, |at| at == 0);
            }
            let mut oldest = self.open.remove(0);
            oldest.early = true;
            self.close(oldest, context, out);
        }
        let (world, run) = (context.world, context.run);
        let at_ns = victim.victim.at_boot_ns;
        let when = Moments { from_ns: run.window_start(at_ns), at_ns, mark_ns: m.header.boot_ns };
        let victim_memcg = Reading::from(&m.victim_memcg);
        let trigger_memcg = Reading::from(&m.trigger_memcg);
        let marked_oom = Reading::from(&m.oom);
        let log = self.log.about(victim.victim.pid, victim.tid, at_ns);
        let (own, out_of) = (victim_memcg.cgroup_id, marked_oom.cgroup_id);
        let oom_scope = scope(m.scope, own, out_of, decision.as_ref(), log, &world.cgroups);
        let decided = decision.map(|d| d.oom).unwrap_or_default();
        let sums_of = |id: u64| world.cgroups.get(id).map(|r| r.tree).unwrap_or_default();
        let mut view = View::new(world, view_of(oom_scope, own, when, world), when, at_ns, sums_of);
        incident::mark_victim(&mut view.tasks, &victim);
        self.open.push(OpenIncident {
            id: None,
            at_ns,
            trigger: (&m.trigger).into(),
            trigger_process: process(&m.trigger),
            mark_scope: m.scope,
            decision,
            mark_ns: m.header.boot_ns,
            oom_scope,
            victim_memcg,
            trigger_memcg,
            marked_oom,
            oom: counters(oom_scope, marked_oom, &[decided, victim_memcg, trigger_memcg], &world.cgroups),
            group: m.flags & wire::VICTIM_GROUP != 0,
            stack: self.pairing.take_stack(victim.key()).unwrap_or_default(),
            victims: vec![victim],
            victims_left_out: 0,
            view,
            loss_base: run.losses.at(when.from_ns),
            early: false,
        });
    }

    /// The kernel log has a line about a kill.
    pub(crate) fn kernel_log_line(&mut self, line: &KernelLogLine, world: &World, run: &Run) {
        self.log.line(line);
        self.refine(world, run);
    }

    /// The kernel log was read up to this time. A stop does not say so.
    pub(crate) fn kernel_log_was_read(&mut self, now: u64) {
        let oldest_ns = self.open.iter().map(|open| open.at_ns).min();
        self.log.tick(now, oldest_ns);
    }

    /// The names of a trigger's kernel stack arrived, possibly before the mark.
    pub(crate) fn kernel_stack(&mut self, victim: ProcessKey, functions: &[String]) {
        let functions = pairing::functions(functions);
        match self.open.iter_mut().find(|o| o.victims.iter().any(|v| v.key() == victim)) {
            Some(open) if open.stack.is_empty() => open.stack = functions,
            Some(_) => {}
            None => self.pairing.store_stack(victim, functions),
        }
    }

    /// The last thread of a process exited.
    pub(crate) fn victim_exited(&mut self, key: ProcessKey, boot_ns: u64) {
        for v in self.open.iter_mut().filter_map(|o| o.victim(key)) {
            v.victim.exit_boot_ns = Some(boot_ns);
        }
    }

    fn refine(&mut self, world: &World, run: &Run) {
        for open in &mut self.open {
            self.changed |= open.refine(&self.log, world, run);
        }
    }

    /// Gives incidents their id and emits ledger lines of victims that are certain; with `all`, of
    /// every victim.
    pub(crate) fn report(&mut self, all: bool, world: &World, run: &Run, out: &mut Out) {
        let reported = &mut (&mut self.sigkills, &mut self.killed, &mut self.lines, &mut self.log);
        self.open.iter_mut().for_each(|open| report_one(open, reported, all, world, run, out));
        self.lines.emit_due(all, run.now, &world.cgroups, out);
    }

    /// Adds victims without a mark. A SIGKILL from the same trigger shortly after a mark goes to a
    /// process that shares the victim's address space (mm/oom_kill.c, __oom_kill_process).
    pub(crate) fn add_sharers(&mut self, all: bool, world: &mut World, run: &Run) {
        for kill in self.pairing.overdue(run.now, all) {
            // Gives a process that ran already when tracing began its exact start.
            world.find(&kill.target);
            self.add_sharer(&kill, world, |_| true);
        }
    }

    /// Adds the target of a SIGKILL to the incident whose mark it followed, if `which` takes the
    /// place of that incident in `open`.
    fn add_sharer(&mut self, kill: &KernelKill, world: &World, which: impl Fn(usize) -> bool) {
        let target = kill.target();
        let open = self
            .open
            .iter_mut()
            .enumerate()
            .filter(|(_, o)| o.trigger == kill.trigger)
            .filter_map(|(at, o)| o.mark_before(kill.boot_ns).map(|mark| (mark, at, o)))
            .max_by_key(|(mark, ..)| *mark);
        let Some((_, at, open)) = open.filter(|_| kill.delivered) else { return };
        if !which(at) {
            return;
        }
        self.pairing.remove_kills(target);
        if open.victim(target).is_some() {
            return;
        }
        let mut victim = sharer(kill);
        let row = world.processes.get(target);
        if let Some(sums) = row.and_then(|row| world.sums_of(row)) {
            let v = &mut victim.victim;
            (v.anon_bytes, v.file_bytes) = (Some(sums.anon), Some(sums.file));
            (v.shmem_bytes, v.swap_bytes) = (Some(sums.shmem), Some(sums.swap));
        }
        victim.victim.exit_boot_ns = row.and_then(|row| row.exited).map(|(ns, _)| ns);
        self.log.hook_saw(victim.victim.pid, victim.tid, kill.boot_ns);
        open.add(victim);
        self.changed = true;
    }

    /// Closes incidents whose window is over; with `all`, every incident. Call [`OomKills::add_sharers`]
    /// first.
    pub(crate) fn close_due(&mut self, all: bool, context: &BuildContext<'_>, out: &mut Out) {
        let (now, after_ns) = (context.run.now, context.run.settings.after_ns);
        self.report(all, context.world, context.run, out);
        let due = |o: &mut OpenIncident| all || now >= o.deadline(after_ns);
        let closing: Vec<OpenIncident> = self.open.extract_if(.., due).collect();
        for mut open in closing {
            open.early = all && now < open.deadline(after_ns);
            self.close(open, context, out);
        }
    }

    fn close(&mut self, mut open: OpenIncident, context: &BuildContext<'_>, out: &mut Out) {
        open.view.follow(context.world);
        open.refine(&self.log, context.world, context.run);
        let reported = &mut (&mut self.sigkills, &mut self.killed, &mut self.lines, &mut self.log);
        report_one(&mut open, reported, true, context.world, context.run, out);
        self.lines.emit_of(open.id.as_deref().unwrap_or_default(), &context.world.cgroups, out);
        let incident = incident::oom_incident(&open, &self.log, context);
        self.changed = true;
        out.outputs.push(Output::Save(Box::new(incident)));
    }

    /// The kill of the newest open incident among these ids, as known so far.
    pub(crate) fn latest_of(&self, ids: &[String], context: &BuildContext<'_>) -> Option<OomFacts> {
        let open = self.open.iter().rev().find(|o| o.id.as_ref().is_some_and(|id| ids.contains(id)));
        open.map(|open| incident::oom(open, &self.log, context))
    }

    /// Emits lines of the SIGKILL ledger that have waited long enough; with `all`, every line.
    pub(crate) fn report_sigkills(&mut self, all: bool, world: &World, run: &mut Run, out: &mut Out) {
        self.sigkills.report_due(all, world, run, out);
    }

    /// Drops old decisions and reports kills that only the kernel log has, or only the hooks.
    pub(crate) fn tick(&mut self, run: &Run, out: &mut Out) {
        self.pairing.tick(run.now);
        let unseen = self.log.unseen(run.now).into_iter().map(|pid| (pid, "kernel_log"));
        let silent = self.log.silent(run.now).into_iter().map(|pid| (pid, "hook"));
        if run.settings.kernel_log {
            let disagrees = |(pid, only_in): (u32, &str)| Finding::Disagreement { pid, only_in: only_in.to_owned() };
            out.outputs.extend(unseen.chain(silent).map(disagrees).map(Output::Alert));
        }
    }

    /// Adds the changes of the current input to the curves of open incidents.
    pub(crate) fn follow(&mut self, world: &World) {
        self.open.iter_mut().for_each(|open| open.view.follow(world));
    }

    /// The input has ended.
    pub(crate) fn input_over(&mut self) {
        self.open.iter_mut().for_each(|open| open.view.input_over());
    }

    /// Whether [`OomKills::cgroups`] may have changed since the last call.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Cgroups that open incidents refer to, which must stay in the table.
    pub(crate) fn cgroups(&self) -> impl Iterator<Item = u64> + '_ {
        let of_open = self.open.iter().flat_map(|o| {
            let victims = o.victims.iter().map(|v| v.victim.cgroup_id);
            victims.chain([o.view.curve_of, o.oom.cgroup_id, o.trigger_memcg.cgroup_id])
        });
        of_open.flatten()
    }

    /// How many kills have no line with their cgroup in the kernel log, because it limits their rate.
    pub(crate) fn log_limited(&self) -> u64 {
        self.log.limited()
    }

    /// Whether the kernel log cannot be read any more.
    pub(crate) fn log_is_unreadable(&self) -> bool {
        self.log.is_unreadable()
    }

    /// Number of open incidents.
    pub(crate) fn open_incidents(&self) -> usize {
        self.open.len()
    }

    /// Estimated memory in bytes.
    pub(crate) fn memory_estimate(&self) -> usize {
        let views: usize = self.open.iter().map(|open| open.view.memory_estimate()).sum();
        views + self.sigkills.memory_estimate() + self.killed.memory_estimate()
    }
}

/// Gives an incident its id and emits ledger lines of its victims that are certain; with `all`, of
/// all. The first ledger line of an incident comes with a finding.
fn report_one(
    open: &mut OpenIncident,
    (sigkills, killed, lines, log): &mut (&mut Sigkills, &mut RecentProcesses, &mut KillLines, &mut KernelLog),
    all: bool,
    world: &World,
    run: &Run,
    out: &mut Out,
) {
    let (now, kills_seen) = (run.now, run.settings.kills_seen);
    let certain = |v: &OpenVictim| all || v.is_certain(now, kills_seen);
    let Some(first) = open.victims.first().filter(|v| open.id.is_some() || certain(v)) else { return };
    let (pid, start_boot_ns) = first.key();
    let comm = first.victim.comm.clone();
    let cgroup_id = first.victim.cgroup_id;
    let fresh = open.id.is_none();
    let (kind, boot_id) = (Kind::OomKill.name(), &run.host.boot_id);
    let identity = Identity { kind, boot_id, boot_ns: open.at_ns, pid, start_boot_ns };
    let id = open.id.get_or_insert_with(|| run.clock.incident_id(&identity)).clone();
    for (place, v) in open.victims.iter_mut().enumerate().filter(|(_, v)| !v.reported && certain(v)) {
        v.reported = true;
        // The kernel logs no line for processes that only share a victim's address space.
        if v.victim.killed && !v.victim.shares_mm && run.settings.kernel_log {
            log.expect(v.victim.pid, v.tid, v.victim.at_boot_ns, place == 0);
        }
        if v.victim.killed {
            killed.insert(v.key());
            sigkills.of_victim(v, &open.trigger_process, &id, world, run, out);
        }
        let line = Output::Kill(KillEntry {
            incident: id.clone(),
            boot_ns: v.victim.at_boot_ns,
            wall: run.clock.wall(v.victim.at_boot_ns),
            pid: v.victim.pid,
            tid: (v.tid != v.victim.pid).then_some(v.tid),
            start_boot_ns: v.victim.start_boot_ns,
            comm: v.victim.comm.clone(),
            cgroup_path: None,
            usage_bytes: open.oom.usage,
            limit_bytes: open.oom.limit.bytes(),
            trigger_pid: open.trigger_process.pid,
            killed: v.victim.killed,
            boot_id: Some(run.host.boot_id.clone()).filter(|id| !id.is_empty()),
        });
        lines.emit(line, (v.victim.cgroup_id, v.victim.at_boot_ns), now, &world.cgroups, out);
    }
    if fresh {
        let found = Finding::OomKill { incident: id, cgroup_id, pid, comm, cgroup_path: None };
        lines.emit(Output::Alert(found), (cgroup_id, open.at_ns), now, &world.cgroups, out);
    }
}
