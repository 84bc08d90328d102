//! What happens in a run: its shape, drawn from the seed, and then one action after another.

use memtrace_common::event::*;

use crate::distort::{Distortion, LATE_MOST};
use crate::kernel::Sort;
use crate::model::{Held, MIB, MS, ROOT, SEC, Switches, World};
use crate::rng::Rng;
use crate::wire::Blind;

/// How many live processes and cgroups a story has at most, and what it is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) switches: Switches,
    pub(crate) distortion: Distortion,
    pub(crate) processes: usize,
    pub(crate) cgroups: usize,
    pub(crate) kernel_log: bool,
    pub(crate) recordings: bool,
    /// Percent of kernel log lines that are lost, with a gap told.
    pub(crate) log_lost: u64,
    /// Thousands of kills in a second, now and then.
    pub(crate) storms: bool,
    /// Percent of questions for a cgroup that are answered.
    pub(crate) answered: u64,
    /// Percent of cgroups that are made unseen, by a hook that lost its record or was not there yet.
    pub(crate) unseen: u64,
    /// Ticks come when they like.
    pub(crate) irregular: bool,
    /// The wall clock is set now and then.
    pub(crate) clock_set: bool,
}

impl Shape {
    pub(crate) fn of(rng: &mut Rng) -> Self {
        let late = rng.percent(60);
        let blind = if rng.percent(30) { rng.next() as u32 & 0xff } else { 0 };
        // Without usage no limit is hit: few of those.
        let blind = if rng.percent(70) { blind & !Blind::USAGE } else { blind };
        Self {
            switches: Switches {
                v1: rng.percent(25),
                decisions: rng.percent(70),
                exit_first: rng.percent(50),
                sample_bytes: if rng.percent(40) { MIB } else { 0 },
                blind: Blind(blind),
                pids: rng.pick(&[30_000, 30_000, 400]).unwrap_or(400),
            },
            distortion: Distortion {
                late_ns: if late { rng.range(MS, LATE_MOST) } else { 0 },
                wild: late && rng.percent(25),
                lose_one_in: if rng.percent(20) { rng.range(20, 400) } else { 0 },
                garbage_one_in: if rng.percent(25) { rng.range(10, 300) } else { 0 },
            },
            processes: rng.pick(&[12, 40, 150]).unwrap_or(12),
            cgroups: rng.pick(&[4, 12, 40]).unwrap_or(4),
            kernel_log: rng.percent(50),
            recordings: rng.percent(25),
            log_lost: rng.pick(&[0, 0, 20]).unwrap_or(0),
            storms: rng.percent(15),
            answered: rng.pick(&[100, 100, 50, 0]).unwrap_or(100),
            unseen: rng.pick(&[0, 0, 20]).unwrap_or(0),
            irregular: rng.percent(30),
            clock_set: rng.percent(20),
        }
    }
}

/// What the run, and not the world, is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Nothing,
    /// Let so many nanoseconds pass.
    Wait(u64),
    BeginRecording,
    EndRecording,
    /// Everything in flight arrives, everything half done is done.
    Settle,
}

/// The author.
#[derive(Debug)]
pub(crate) struct Story {
    pub(crate) rng: Rng,
    pub(crate) shape: Shape,
    /// Kills to come, and the time between two of them.
    pub(crate) storm: (u64, u64),
}

impl Story {
    /// What is there before the first record.
    pub(crate) fn prologue(&mut self, world: &mut World) {
        for n in 0..self.rng.range(1, 3) {
            if let Some(id) = world.make_cgroup(ROOT, &format!("slice{n}"), false) {
                self.limit(world, id);
                world.found(id, self.holding());
            }
        }
        world.found(ROOT, self.holding());
    }

    fn holding(&mut self) -> Held {
        let pages = |rng: &mut Rng, most: u64| rng.range(1, most) * 4096;
        Held { anon: pages(&mut self.rng, 2000), file: pages(&mut self.rng, 500), ..Held::default() }
    }

    /// One action.
    pub(crate) fn act(&mut self, world: &mut World) -> Ask {
        let Some(pid) = self.rng.pick(&world.pids()) else {
            world.born(ROOT);
            return Ask::Nothing;
        };
        if self.storm.0 > 0 {
            self.storm.0 -= 1;
            world.now += self.storm.1;
            self.killed_at_birth(world, pid);
            return Ask::Nothing;
        }
        world.now += self.rng.below(4 * MS);
        match self.rng.below(120) {
            0..45 => self.touch(world, pid),
            45..54 => world.give_back(pid, self.rng.range(5, 90)),
            54..63 => self.fork(world, pid),
            63..69 => world.exec(pid, &format!("prog{}", self.rng.below(50))),
            69..74 => self.exit(world, pid),
            74..77 => self.kill(world, pid),
            77..81 => self.make_cgroup(world),
            81..83 => self.in_some_cgroup(world, World::remove_cgroup),
            83..86 => {
                let to = self.cgroup(world);
                world.attach(pid, to);
            }
            86..90 => {
                let id = self.cgroup(world);
                self.limit(world, id);
            }
            90..95 => world.read_file(pid, self.rng.range(1, 2000) * 4096),
            95..97 => self.in_some_cgroup(world, |world, id| {
                let cache = world.cgroups.get(&id).map_or(0, |c| c.cache);
                world.cache(id, cache, false);
            }),
            97 => drop(world.out_of_memory(pid, None)),
            98..100 => self.spike(world, pid),
            100 => world.map(pid, world.processes.get(&pid).map_or(0, |p| p.cgroup), CALL_MMAP, 16 * MIB),
            101 => self.exhaust(world, pid),
            102 if self.shape.storms && self.rng.percent(10) => self.storm(),
            103..105 => self.switch_oom(world),
            105..107 if self.shape.recordings => return self.recording(),
            107..113 => return Ask::Wait(self.rng.below(300 * MS)),
            113 => return Ask::Wait(self.rng.below(8 * SEC)),
            114 if self.rng.percent(20) => return Ask::Settle,
            _ => {}
        }
        Ask::Nothing
    }

    fn recording(&mut self) -> Ask {
        if self.rng.percent(50) { Ask::BeginRecording } else { Ask::EndRecording }
    }

    fn cgroup(&mut self, world: &World) -> u64 {
        self.rng.pick(&world.live_cgroups()).unwrap_or(ROOT)
    }

    fn in_some_cgroup(&mut self, world: &mut World, act: impl FnOnce(&mut World, u64)) {
        let id = self.cgroup(world);
        act(world, id);
    }

    fn touch(&mut self, world: &mut World, pid: u32) {
        let pages = if self.rng.percent(20) { self.rng.range(500, 6000) } else { self.rng.range(1, 600) };
        let sort = match self.rng.below(10) {
            0 => Sort::File,
            1 => Sort::Shmem,
            _ => Sort::Anon,
        };
        world.touch(pid, pages * 4096, sort);
    }

    fn fork(&mut self, world: &mut World, pid: u32) {
        if world.processes.len() >= self.shape.processes {
            return;
        }
        let shares = self.rng.percent(25);
        if let Some(child) = world.fork(pid, shares) {
            if self.rng.percent(50) {
                world.exec(child, &format!("prog{}", self.rng.below(50)));
            }
            if self.rng.percent(30) {
                let to = self.cgroup(world);
                world.attach(child, to);
            }
        }
    }

    fn exit(&mut self, world: &mut World, pid: u32) {
        if world.processes.len() > 2 {
            world.exit(pid);
        }
    }

    fn kill(&mut self, world: &mut World, pid: u32) {
        let Some(target) = self.rng.pick(&world.pids()) else { return };
        match self.rng.below(6) {
            0 => {
                let id = self.cgroup(world);
                for target in world.inside(id).into_iter().take(5) {
                    world.kill(pid, target, SENDER_NOINFO);
                }
            }
            // RLIMIT_CPU: the kernel, in the process' own context; not after that may be a trigger's.
            1 if world.victims.is_empty() => world.kill(target, target, SENDER_KERNEL),
            2 => world.kill(pid, target, SENDER_PARENT),
            _ => world.kill(pid, target, SENDER_PROCESS),
        }
    }

    fn make_cgroup(&mut self, world: &mut World) {
        if world.live_cgroups().len() >= self.shape.cgroups {
            return;
        }
        let parent = self.cgroup(world);
        // Deep trees are rare.
        if world.chain(parent).len() > 6 {
            return;
        }
        let told = !self.rng.percent(self.shape.unseen);
        let name = format!("c{}", self.rng.below(20));
        let Some(id) = world.make_cgroup(parent, &name, told) else { return };
        self.limit(world, id);
        if world.processes.len() < self.shape.processes
            && let Some(parent) = self.rng.pick(&world.pids())
            && let Some(child) = world.fork(parent, false)
        {
            world.attach(child, id);
            world.exec(child, "service");
        }
    }

    fn limit(&mut self, world: &mut World, id: u64) {
        let max = if self.rng.percent(25) { NO_LIMIT } else { self.rng.range(8, 128) * MIB };
        let high = if self.rng.percent(70) || world.switches.v1 { NO_LIMIT } else { self.rng.range(4, 100) * MIB };
        world.limit(id, max, high);
    }

    /// Up close to the limit and down again.
    fn spike(&mut self, world: &mut World, pid: u32) {
        let Some(id) = world.processes.get(&pid).map(|p| p.cgroup) else { return };
        let Some((max, usage)) = world.cgroups.get(&id).map(|c| (c.max, c.usage)) else { return };
        if max == NO_LIMIT {
            return;
        }
        for _ in 0..4 {
            world.now += 30 * MS;
            world.touch(pid, (max / 10 * 9).saturating_sub(usage) / 4 / 4096 * 4096, Sort::Anon);
        }
        world.now += 50 * MS;
        world.give_back(pid, 80);
    }

    /// Grows until somebody is killed.
    fn exhaust(&mut self, world: &mut World, pid: u32) {
        for _ in 0..64 {
            if world.processes.get(&pid).is_none_or(|p| p.dies_ns.is_some()) {
                return;
            }
            world.now += self.rng.below(2 * MS);
            world.touch(pid, 4 * MIB, Sort::Anon);
        }
    }

    /// From here on a kill with every action, for a while.
    fn storm(&mut self) {
        let gap = self.rng.pick(&[20_000, 200_000, MS]).unwrap_or(MS);
        self.storm = (self.rng.range(50, 1500), gap);
    }

    fn killed_at_birth(&mut self, world: &mut World, parent: u32) {
        let shares = self.rng.percent(20);
        let Some(child) = world.fork(parent, shares) else { return };
        let id = world.processes.get(&child).map(|p| p.cgroup);
        world.out_of_memory(child, id);
    }

    /// v1: the OOM killer of a cgroup is switched, or somebody helps one that waits.
    fn switch_oom(&mut self, world: &mut World) {
        if !world.switches.v1 {
            return;
        }
        let id = self.cgroup(world);
        let off = self.rng.percent(50);
        if let Some(c) = world.cgroups.get_mut(&id).filter(|c| c.parent.is_some()) {
            c.kill_disabled = off;
            c.under_oom &= off && self.rng.percent(50);
        }
    }
}

impl World {
    /// What was to end by now ends.
    pub(crate) fn due(&mut self) {
        let now = self.now;
        let dead: Vec<u32> =
            self.processes.values().filter(|p| p.dies_ns.is_some_and(|at| at <= now)).map(|p| p.pid).collect();
        dead.into_iter().for_each(|pid| self.exit(pid));
        let (over, still): (Vec<_>, Vec<_>) = self.lingering.iter().partition(|(at, _)| *at <= now);
        self.lingering = still;
        over.into_iter().for_each(|(_, serial): (u64, u64)| self.tear_down(serial));
    }

    /// Whatever is half done is done: the killed are dead, what lingered is gone.
    pub(crate) fn finish(&mut self) {
        let last = self.processes.values().filter_map(|p| p.dies_ns).chain(self.lingering.iter().map(|(at, _)| *at));
        self.now = last.max().unwrap_or(0).max(self.now);
        self.due();
        // A dying process may have left memory that lingers.
        let last = self.lingering.iter().map(|(at, _)| *at).max().unwrap_or(0);
        self.now = self.now.max(last);
        self.due();
    }
}
