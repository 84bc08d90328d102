//! One run: the story moves the world, the world's records go through the rings, the engine gets them with the facts a
//! session would add, and everything it says is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::adapter::{self, Fact, Fault, Out, Step, Subject};
use crate::distort::Rings;
use crate::invariants::{Violation, Witness, hold, sums};
use crate::model::{MS, SEC, World};
use crate::replay::{Cut, hash};
use crate::rng::Rng;
use crate::story::{Ask, Shape, Story};
use crate::wire::readable;

/// A bound for what the engine says it takes, bytes.
const MEMORY_BOUND: u64 = 200 << 20;
/// Inputs between two looks at the engine's own counts.
const COUNTS_EVERY: usize = 64;
/// What is to be run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// Inputs after which the story ends.
    pub(crate) events: u64,
    pub(crate) fault: Fault,
    /// Inputs shown of a run that fails.
    pub(crate) tail: usize,
}

/// How it went.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) events: u64,
    pub(crate) incidents: u64,
    pub(crate) victims: u64,
    pub(crate) shape: String,
    pub(crate) violation: Option<Violation>,
    /// The last inputs, readable.
    pub(crate) tail: Vec<String>,
}

/// Runs a story to its end or to the first violation.
pub(crate) fn run(plan: &Plan) -> Report {
    let mut run = Run::new(plan);
    let violation = run.play(plan.events).err();
    let tail = run.steps.iter().enumerate().rev().take(plan.tail).map(|(n, step)| format!("{n:>6} {}", text(step)));
    let mut tail: Vec<String> = tail.collect();
    tail.reverse();
    Report {
        events: run.steps.len() as u64,
        incidents: run.witness.saved.len() as u64,
        victims: run.world.victims.len() as u64,
        shape: format!("{:?}", run.story.shape),
        violation,
        tail,
    }
}

fn text(step: &Step) -> String {
    match step {
        Step::Record(bytes) => readable(bytes),
        Step::Fact(fact) => format!("{fact:?}").chars().take(240).collect(),
    }
}

/// Everything about a run. Inputs are kept for the replays: as many as the plan says, and a little more.
struct Run {
    world: World,
    rings: Rings,
    story: Story,
    subject: Subject,
    witness: Witness,
    steps: Vec<Step>,
    /// What the engine said to each input, hashed; inputs that it said nothing to are left out.
    said: Vec<(usize, u64)>,
    /// The first input of each decision of the OOM killer.
    first: BTreeMap<usize, usize>,
    /// Cgroups the engine asked for, with when the answer comes. At most one open question a cgroup.
    questions: BTreeMap<u64, u64>,
    /// memory.oom_control as last told.
    watched: BTreeMap<u64, (bool, bool)>,
    paths: BTreeSet<u32>,
    rng: Rng,
    next_tick: u64,
    next_losses: u64,
    cut_at: usize,
    cut: Option<Cut>,
    fault: Fault,
}

impl Run {
    fn new(plan: &Plan) -> Self {
        let mut rng = Rng::new(plan.seed);
        let shape = Shape::of(&mut rng);
        let world = World::new(rng.fork(), shape.switches);
        Self {
            rings: Rings::new(rng.fork(), shape.distortion),
            story: Story { rng: rng.fork(), shape, storm: (0, 0) },
            subject: Subject::new(plan.fault),
            witness: Witness::default(),
            steps: Vec::new(),
            said: Vec::new(),
            first: BTreeMap::new(),
            questions: BTreeMap::new(),
            watched: BTreeMap::new(),
            paths: BTreeSet::new(),
            next_tick: world.now,
            next_losses: world.now + SEC,
            cut_at: usize::try_from(rng.range(40, 2000)).unwrap_or(40),
            cut: None,
            fault: plan.fault,
            world,
            rng,
        }
    }

    fn play(&mut self, events: u64) -> Result<(), Violation> {
        self.begin()?;
        while (self.steps.len() as u64) < events {
            let ask = self.story.act(&mut self.world);
            self.world.due();
            self.pump(false)?;
            match ask {
                Ask::Nothing => {}
                Ask::Wait(ns) => self.wait(ns)?,
                Ask::Settle => self.settle()?,
                Ask::BeginRecording => self.begin_recording()?,
                Ask::EndRecording => self.end_recording()?,
            }
            if self.cut.is_none() && self.steps.len() >= self.cut_at {
                self.cut_here()?;
            }
            if self.rng.once_in(1500) {
                self.repeat_preamble()?;
            }
        }
        self.settle()?;
        self.end()
    }

    /// A session's start: the machine, the clocks, what is there already.
    fn begin(&mut self) -> Result<(), Violation> {
        self.feed(Step::Fact(adapter::start(&self.story.shape)))?;
        self.anchor()?;
        self.story.prologue(&mut self.world);
        let (now, blind) = (self.world.now, self.world.switches.blind);
        let cgroups = self.world.cgroups.iter().map(|(id, c)| adapter::cgroup_found(*id, c, now, blind));
        let mut facts: Vec<Fact> = cgroups.collect();
        for p in self.world.processes.values() {
            let held = self.world.spaces.get(&p.space).map(|s| s.held).unwrap_or_default();
            facts.push(adapter::process_found(p.key(), p.parent, &p.name, p.cgroup, now, &held));
        }
        facts.into_iter().try_for_each(|fact| self.feed(Step::Fact(fact)))
    }

    fn anchor(&mut self) -> Result<(), Violation> {
        let set = if self.story.shape.clock_set { self.rng.below(3600 * SEC) } else { 0 };
        let boot_ns = self.world.now;
        let wall_ns = 1_700_000_000_000_000_000 + i64::try_from(boot_ns + set).unwrap_or(0);
        let uncertainty_ns = self.rng.below(5000);
        self.feed(Step::Fact(Fact::Anchor { boot_ns, wall_ns, uncertainty_ns }))
    }

    /// Gives the engine one input and checks what it says.
    fn feed(&mut self, step: Step) -> Result<(), Violation> {
        let subject = &mut self.subject;
        let outs = catch_unwind(AssertUnwindSafe(|| subject.apply(&step)));
        self.steps.push(step);
        let Ok(outs) = outs else {
            return Err(Violation { invariant: "no panic", detail: "the engine panicked, see above".to_owned() });
        };
        if !outs.is_empty() {
            self.said.push((self.steps.len() - 1, hash(&outs)));
        }
        for out in &outs {
            self.answer(out);
            self.witness.see(out, &self.world, &self.rings.lost)?;
        }
        if self.steps.len().is_multiple_of(COUNTS_EVERY) { self.bounded() } else { Ok(()) }
    }

    /// What a session does when it is asked.
    fn answer(&mut self, out: &Out) {
        match out {
            Out::LookUp(id) if self.rng.percent(self.story.shape.answered) => {
                let at = self.world.now + self.rng.below(3 * SEC);
                self.questions.entry(*id).or_insert(at);
            }
            Out::Watch(id) => drop(self.watched.entry(*id).or_insert((false, false))),
            Out::Threshold(id, bytes) => drop(self.world.thresholds.insert(*id, *bytes)),
            _ => {}
        }
    }

    fn bounded(&self) -> Result<(), Violation> {
        let c = self.subject.counts();
        let caps = c.processes <= adapter::PROCESSES_CAP
            && c.open_incidents <= adapter::OPEN_CAP
            && c.cgroups <= adapter::CGROUPS_CAP
            && c.memory_estimate_bytes <= MEMORY_BOUND;
        hold("collections are under their caps", caps, || format!("{c:?}"))
    }

    /// One turn of the session's loop, when there is reason for one.
    fn pump(&mut self, all: bool) -> Result<(), Violation> {
        let emitted = std::mem::take(&mut self.world.out);
        let killed = emitted.iter().any(|e| e.decision.is_some());
        self.rings.accept(emitted);
        let now = self.world.now;
        let tick = now >= self.next_tick;
        if !(all || tick || killed || self.rng.once_in(16)) {
            return Ok(());
        }
        for e in self.rings.drain(now) {
            if let Some(decision) = e.decision {
                self.first.entry(decision).or_insert(self.steps.len());
            }
            if let (Some(decision), Some(key)) = (e.decision, e.victim)
                && self.witness.closed_early(decision, &self.world)
                && let Some(victim) = self.world.victims.get_mut(&key)
            {
                victim.late = true;
            }
            let garbage = self.rings.garbage(&e.bytes);
            self.feed(Step::Record(e.bytes))?;
            garbage.map_or(Ok(()), |bytes| self.feed(Step::Record(bytes)))?;
        }
        if tick || all { self.tick(now) } else { Ok(()) }
    }

    fn tick(&mut self, now: u64) -> Result<(), Violation> {
        let pause = if self.story.shape.irregular { self.rng.below(2 * SEC) } else { 100 * MS };
        self.next_tick = now + pause;
        self.log(now)?;
        if self.rng.once_in(100) {
            self.anchor()?;
        }
        if now >= self.next_losses {
            self.next_losses = now + SEC;
            let totals: Vec<(String, u64)> = self.rings.lost.totals.clone().into_iter().collect();
            if !totals.is_empty() {
                self.feed(Step::Fact(Fact::Losses { totals }))?;
            }
        }
        self.stacks()?;
        self.questions(now)?;
        self.oom_control(now)?;
        self.feed(Step::Fact(Fact::Tick { boot_ns: now }))?;
        // Who shares memory is told by the mark of another.
        let lost: BTreeSet<usize> = std::mem::take(&mut self.rings.lost.decisions).into_iter().collect();
        for victim in self.world.victims.values_mut().filter(|_| !lost.is_empty()) {
            victim.lost |= victim.decisions.iter().any(|d| lost.contains(d));
        }
        Ok(())
    }

    fn log(&mut self, now: u64) -> Result<(), Violation> {
        let notes = std::mem::take(&mut self.world.log);
        if !self.story.shape.kernel_log {
            return Ok(());
        }
        let mut gap = 0;
        for note in notes {
            if self.rng.percent(self.story.shape.log_lost) {
                gap += 1;
            } else if note.oom.is_none() || self.rng.percent(70) {
                self.feed(Step::Fact(adapter::log_line(&note, now)))?;
            }
        }
        if gap > 0 { self.feed(Step::Fact(adapter::log_gap(gap, now))) } else { Ok(()) }
    }

    fn stacks(&mut self) -> Result<(), Violation> {
        const MODULES: u32 = 20;
        for note in std::mem::take(&mut self.world.stacks) {
            let path = self.rng.below(200) as u32;
            if self.paths.is_empty() {
                (0..MODULES).try_for_each(|id| self.feed(Step::Fact(adapter::module(id))))?;
            }
            if self.paths.insert(path) || self.rng.once_in(50) {
                self.feed(Step::Fact(adapter::path(path, MODULES)))?;
            }
            self.feed(Step::Fact(adapter::stack(&note, path)))?;
        }
        Ok(())
    }

    fn questions(&mut self, now: u64) -> Result<(), Violation> {
        let due: Vec<u64> = self.questions.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        for id in due {
            self.questions.remove(&id);
            let Some(c) = self.world.cgroups.get(&id).filter(|c| !c.removed) else { continue };
            let fact = adapter::cgroup_found(id, c, now, self.world.switches.blind);
            self.feed(Step::Fact(fact))?;
        }
        Ok(())
    }

    fn oom_control(&mut self, boot_ns: u64) -> Result<(), Violation> {
        let mut facts = Vec::new();
        for (id, told) in &mut self.watched {
            let Some(c) = self.world.cgroups.get(id) else { continue };
            let now = (c.kill_disabled, c.under_oom);
            if std::mem::replace(told, now) != now {
                let (kill_disabled, under_oom) = now;
                facts.push(Fact::OomControl { cgroup_id: *id, boot_ns, kill_disabled, under_oom });
            }
        }
        facts.into_iter().try_for_each(|fact| self.feed(Step::Fact(fact)))
    }

    fn wait(&mut self, ns: u64) -> Result<(), Violation> {
        let end = self.world.now + ns;
        while self.world.now < end {
            self.world.now = end.min(self.world.now + 100 * MS);
            self.world.due();
            self.pump(false)?;
        }
        Ok(())
    }

    fn begin_recording(&mut self) -> Result<(), Violation> {
        self.catch_up()?;
        let cgroup_id = self.rng.pick(&self.world.live_cgroups()).filter(|_| self.rng.percent(60));
        let pid = if cgroup_id.is_none() { self.rng.pick(&self.world.pids()) } else { None };
        let (boot_ns, command) = (self.world.now, vec!["make".to_owned()]);
        self.feed(Step::Fact(Fact::RecordingBegin { cgroup_id, pid, command, boot_ns }))
    }

    fn end_recording(&mut self) -> Result<(), Violation> {
        self.catch_up()?;
        let boot_ns = self.world.now;
        self.feed(Step::Fact(Fact::RecordingEnd { boot_ns, exit_code: Some(0), signal: None, cgroup_peak_bytes: None }))
    }

    /// A new journal segment of the same run: the engine hears what it knows already.
    fn repeat_preamble(&mut self) -> Result<(), Violation> {
        let facts = self.subject.preamble(self.world.now);
        facts.into_iter().try_for_each(|fact| self.feed(Step::Fact(fact)))
    }

    /// Everything in flight arrives, as a session waits for it before a recording ends.
    fn catch_up(&mut self) -> Result<(), Violation> {
        self.pump(true)?;
        while !self.rings.is_empty() {
            self.world.now += 20 * MS;
            self.pump(true)?;
        }
        Ok(())
    }

    /// Everything half done is done, everything in flight arrives, time passes: now the engine must agree.
    fn settle(&mut self) -> Result<(), Violation> {
        self.world.finish();
        self.catch_up()?;
        for _ in 0..3 {
            self.world.now += SEC;
            self.world.due();
            self.pump(true)?;
        }
        if self.rings.lost.any {
            return Ok(());
        }
        sums(&self.subject.snapshot(), &self.world, self.story.shape.unseen == 0)
    }

    /// The moment at which other engines will begin or stop.
    fn cut_here(&mut self) -> Result<(), Violation> {
        let preamble = self.subject.preamble(self.world.now);
        let cut = Cut { at: self.steps.len(), preamble, subject: self.subject.clone() };
        cut.stop(self.world.now, &self.witness, &self.world, &self.rings.lost)?;
        self.cut = Some(cut);
        Ok(())
    }

    fn end(&mut self) -> Result<(), Violation> {
        self.feed(Step::Fact(Fact::Stop { boot_ns: self.world.now }))?;
        let counts = self.subject.counts();
        hold("a stop closes everything", (counts.open_incidents, counts.stuck_cgroups) == (0, 0), || {
            format!("{counts:?}")
        })?;
        let bad = counts.bad_records + counts.unknown_kinds;
        hold("what is no record is counted", bad == self.rings.garbage, || {
            format!("{} were sent: {counts:?}", self.rings.garbage)
        })?;
        self.witness.stopped()?;
        let strict = !self.story.shape.distortion.wild && !self.rings.lost.any;
        self.witness.complete(&self.world, strict)?;
        crate::replay::same(&self.steps, &self.said, self.fault)?;
        let Some(cut) = &self.cut else { return Ok(()) };
        cut.preamble_changes_nothing(&self.steps, &self.said)?;
        cut.rest_alone(&self.steps, &self.witness, &self.world, &self.first, self.fault)
    }
}
