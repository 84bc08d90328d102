//! The model's OOM killer and everybody else who sends SIGKILL, in the kernel's order (mm/oom_kill.c): decision,
//! SIGKILL to the victim, mark of the victim, SIGKILLs to those that share its memory; for a group, again per member.

use memtrace_common::event::*;

use crate::model::{Held, Key, LogNote, MS, SEC, Victim, World};
use crate::wire::{self, Blind, Hook, Ring, blank, bytes};

/// A decision of the OOM killer while it is carried out.
#[derive(Clone, Copy, Debug)]
struct Decision {
    number: usize,
    trigger: Task,
    trigger_cgroup: u64,
    /// The cgroup that ran out; none for the machine.
    out: Option<u64>,
    group: bool,
}

impl World {
    /// Memory ran out for a process, in a cgroup or (none) on the machine. False when nobody was killed for it.
    pub(crate) fn out_of_memory(&mut self, trigger: u32, out: Option<u64>) -> bool {
        let Some(p) = self.processes.get(&trigger) else { return false };
        let (trigger_cgroup, exiting) = (p.cgroup, p.killed);
        if let Some(full) = out
            && self.disabled(full)
        {
            return false;
        }
        let trigger_task = self.some_thread(trigger);
        let group = false;
        let mut d = Decision { number: self.decisions, trigger: trigger_task, trigger_cgroup, out, group };
        if exiting {
            // task_will_free_mem(current): it is marked, nobody decides anything.
            self.decisions += 1;
            self.mark(&d, trigger_task);
            return false;
        }
        if self.victim_in_progress(out) && !self.rng.percent(20) {
            return false;
        }
        let Some(chosen) = self.choose(out) else { return false };
        self.decisions += 1;
        let members = self.group_of(chosen, out);
        d.group = !members.is_empty();
        self.decide(&d, chosen);
        if self.processes.get(&chosen).is_some_and(|p| p.killed) {
            let thread = self.first_with_memory(chosen);
            self.mark(&d, thread);
            return true;
        }
        self.log_decision(&d, chosen);
        self.kill_process(&d, chosen);
        for member in members.into_iter().filter(|pid| *pid != chosen) {
            self.now += self.rng.below(MS / 4);
            self.kill_process(&d, member);
        }
        true
    }

    /// v1: tasks wait instead.
    fn disabled(&mut self, full: u64) -> bool {
        let Some(c) = self.cgroups.get_mut(&full).filter(|c| c.kill_disabled) else { return false };
        c.under_oom = true;
        true
    }

    fn victim_in_progress(&self, out: Option<u64>) -> bool {
        self.scope(out).iter().any(|pid| self.processes.get(pid).is_some_and(|p| !p.marked.is_empty()))
    }

    fn scope(&self, out: Option<u64>) -> Vec<u32> {
        out.map_or_else(|| self.pids(), |root| self.inside(root))
    }

    fn resident(&self, pid: u32) -> u64 {
        let space = self.processes.get(&pid).and_then(|p| self.spaces.get(&p.space));
        space.map_or(0, |s| s.held.resident() + s.held.swap)
    }

    fn choose(&self, out: Option<u64>) -> Option<u32> {
        let may = |pid: &u32| self.processes.get(pid).is_some_and(|p| !p.spared && p.marked.is_empty());
        self.scope(out).into_iter().filter(may).max_by_key(|pid| (self.resident(*pid), *pid))
    }

    /// Everybody in the highest cgroup between victim and what ran out that has `memory.oom.group`.
    fn group_of(&self, chosen: u32, out: Option<u64>) -> Vec<u32> {
        let Some(own) = self.processes.get(&chosen).map(|p| p.cgroup) else { return Vec::new() };
        let mut top = None;
        for id in self.chain(own) {
            if self.cgroups.get(&id).is_some_and(|c| c.group) {
                top = Some(id);
            }
            if Some(id) == out {
                break;
            }
        }
        let spared = |pid: &u32| self.processes.get(pid).is_some_and(|p| p.spared);
        top.map(|id| self.inside(id)).unwrap_or_default().into_iter().filter(|pid| !spared(pid)).collect()
    }

    fn decide(&mut self, d: &Decision, chosen: u32) {
        let hook = self.hook();
        if !self.switches.decisions {
            return;
        }
        let record = OomDecision {
            trigger: d.trigger,
            chosen: self.thread(chosen, 0),
            oom: d.out.map_or(wire::unread(UNKNOWN), |id| self.memcg(id)),
            constraint: if d.out.is_some() { 3 } else { 0 },
            order: 0,
            ..blank(hook)
        };
        self.send(hook, d, None, bytes(&record));
    }

    fn send(&mut self, hook: Hook, d: &Decision, victim: Option<Key>, bytes: Vec<u8>) {
        self.emit(hook, Ring::Ledger, bytes);
        if let Some(last) = self.out.last_mut() {
            (last.decision, last.victim) = (Some(d.number), victim);
        }
    }

    /// find_lock_task_mm: the first thread, or another when that one has exited.
    fn first_with_memory(&self, pid: u32) -> Task {
        let gone = self.processes.get(&pid).is_some_and(|p| p.leader_gone && p.threads > 0);
        self.thread(pid, u32::from(gone))
    }

    /// __oom_kill_process.
    fn kill_process(&mut self, d: &Decision, pid: u32) {
        let Some(serial) = self.processes.get(&pid).map(|p| p.space) else { return };
        let thread = self.first_with_memory(pid);
        self.sigkill(d, thread);
        self.now += self.rng.below(50_000);
        self.mark(d, thread);
        self.log_killed(thread);
        let users = self.spaces.get(&serial).map(|s| s.users.clone()).unwrap_or_default();
        for sharer in users.into_iter().filter(|user| *user != pid) {
            let target = self.thread(sharer, 0);
            self.sigkill(d, target);
        }
    }

    /// SIGKILL by the OOM killer.
    fn sigkill(&mut self, d: &Decision, target: Task) {
        let hook = self.hook();
        let Some(p) = self.processes.get_mut(&target.tgid) else { return };
        let (key, cgroup_id, before) = (p.key(), p.cgroup, std::mem::replace(&mut p.killed, true));
        self.dies_soon(target.tgid);
        let kill = Kill {
            sender: d.trigger,
            target,
            cgroup_id,
            sender_code: SENDER_KERNEL,
            result: u32::from(before),
            ..blank(hook)
        };
        self.send(hook, d, Some(key), bytes(&kill));
        let victim = self.victim(key, d.number);
        victim.killed |= !before;
    }

    fn victim(&mut self, key: Key, decision: usize) -> &mut Victim {
        let blank = Victim { decisions: Vec::new(), killed: false, marked: false, lost: false, late: false };
        let victim = self.victims.entry(key).or_insert(blank);
        if victim.decisions.last() != Some(&decision) {
            victim.decisions.push(decision);
        }
        victim
    }

    fn dies_soon(&mut self, pid: u32) {
        let slow = self.rng.percent(10);
        let at = self.now + if slow { self.rng.below(2 * SEC) } else { self.rng.below(60 * MS) };
        if let Some(p) = self.processes.get_mut(&pid) {
            p.dies_ns = p.dies_ns.or(Some(at));
        }
    }

    /// mark_oom_victim: once a thread.
    fn mark(&mut self, d: &Decision, thread: Task) {
        let Some(p) = self.processes.get_mut(&thread.tgid) else { return };
        if !p.marked.insert(thread.tid) {
            return;
        }
        let (key, serial, cgroup) = (p.key(), p.space, p.cgroup);
        let hook = self.hook();
        let killed_at = self.killed_at(d, key);
        let killed = killed_at.is_some();
        // On a real-time kernel another SIGKILL on this CPU may hide the first one from the hook.
        let hidden = self.switches.decisions && self.rng.percent(5);
        let killed_at = killed_at.filter(|_| !hidden);
        let blind = self.switches.blind;
        let held = self.spaces.get(&serial).map(|s| s.held).unwrap_or_default();
        let rss = if blind.to(Blind::VICTIM_RSS) { wire::UNREAD_RSS } else { held.wire() };
        let record = OomVictim {
            trigger: d.trigger,
            victim: thread,
            trigger_memcg: self.memcg(d.trigger_cgroup),
            victim_memcg: self.memcg(cgroup),
            oom: d.out.map_or(wire::unread(UNKNOWN), |id| self.memcg(id)),
            rss,
            pagetable_bytes: if blind.to(Blind::PAGETABLES) { UNKNOWN } else { 64 * 1024 },
            oom_score_adj: if blind.to(Blind::OOM_SCORE) { UNKNOWN_I32 } else { 0 },
            scope: if d.out.is_some() { SCOPE_MEMCG } else { SCOPE_GLOBAL },
            flags: u32::from(killed_at.is_some()) * VICTIM_KILLED + u32::from(d.group) * VICTIM_GROUP,
            after_kill_ns: killed_at.map_or(0, |at| u32::try_from(hook.ns - at).unwrap_or(u32::MAX)),
            ..blank(hook)
        };
        self.send(hook, d, Some(key), bytes(&record));
        let victim = self.victim(key, d.number);
        victim.marked = true;
        // Whoever killed it first: the OOM killer has sent SIGKILL and marked it.
        victim.killed |= killed;
        self.exact(serial, held);
    }

    /// When this decision sent SIGKILL to a process, if the record before is that.
    fn killed_at(&self, d: &Decision, key: Key) -> Option<u64> {
        let last = self.out.last().filter(|last| last.decision == Some(d.number) && last.victim == Some(key))?;
        (last.bytes.first_chunk::<2>() == Some(&KIND_KILL.to_ne_bytes())).then_some(last.ns)
    }

    /// A mark has told what its victim holds.
    fn exact(&mut self, serial: u64, held: Held) {
        let blind = self.switches.blind.to(Blind::VICTIM_RSS);
        if let Some(told) = self.spaces.get_mut(&serial).and_then(|s| s.told.as_mut()).filter(|_| !blind) {
            told.held = held;
        }
    }

    fn log_decision(&mut self, d: &Decision, chosen: u32) {
        let Some(p) = self.processes.get(&chosen) else { return };
        let path = |id: u64| self.cgroups.get(&id).map(|c| c.path.clone()).unwrap_or_default();
        let constraint = if d.out.is_some() { "CONSTRAINT_MEMCG" } else { "CONSTRAINT_NONE" };
        let oom = Some((constraint, d.out.map(path), path(p.cgroup)));
        self.log.push(LogNote { ns: self.now, pid: chosen, comm: p.name.clone(), oom });
    }

    fn log_killed(&mut self, thread: Task) {
        let comm = self.processes.get(&thread.tgid).map(|p| p.name.clone()).unwrap_or_default();
        self.log.push(LogNote { ns: self.now, pid: thread.tid, comm, oom: None });
    }

    /// Somebody else sends SIGKILL.
    pub(crate) fn kill(&mut self, sender: u32, target: u32, sender_code: u32) {
        let sender = self.some_thread(sender);
        let Some(p) = self.processes.get_mut(&target) else { return };
        let (key, cgroup_id, before) = (p.key(), p.cgroup, std::mem::replace(&mut p.killed, true));
        self.dies_soon(target);
        let hook = self.hook();
        let target = self.thread(target, 0);
        let kill = Kill { sender, target, cgroup_id, sender_code, result: u32::from(before), ..blank(hook) };
        let ring = if sender_code == SENDER_KERNEL { Ring::Ledger } else { Ring::Samples };
        self.emit(hook, ring, bytes(&kill));
        self.others.insert(key);
    }
}
