//! Looks cgroups up by id, and lists them, on a thread of its own: the recorder never waits for a
//! walk.
//!
//! Where the kernel opens a cgroup by its id ([`super::by_id`]) an answer takes microseconds.
//! Elsewhere one walk answers every id that waits. CPU time is bounded by [`Budget`], so a tree of
//! tens of thousands of cgroups makes answers late and nothing else; only what a kill or a watch waits
//! for is looked up at once. An id that was answered, or that no cgroup has, is not looked up again for a
//! while.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use memtrace_engine::CGROUPS_CAP;
use memtrace_engine::input::CgroupFound;
use tracing::warn;

use super::by_id::ById;
use super::files::CgroupDir;
use super::hierarchy::Hierarchy;
use super::oom_control::ControlFile;
use crate::clock;
use crate::own_process::rights::ASKER;

/// Asks on their way to the thread, and answers on their way back; answers that a kill waits for
/// have a queue of their own, as long.
const QUEUE_CAP: usize = 1024;
/// Asks on their way that no kill waits for; the rest of the queue is for those.
const ORDINARY_CAP: usize = QUEUE_CAP / 4 * 3;
/// Ids that wait for an answer; one more is left out, and the engine asks again.
const WAITING_CAP: usize = 4096;
/// Ids that are not looked up again for a while; the set is emptied when it is full.
const QUIET_CAP: usize = 16_384;
/// How long an id that no cgroup has is not looked up again.
const QUIET_ABSENT: Duration = Duration::from_secs(30);
/// The same for an id that was answered: the engine may have asked twice.
const QUIET_FOUND: Duration = Duration::from_secs(5);
/// Cgroups whose memory.oom_control is asked for at once: each answer has two descriptors.
const CONTROLS_CAP: usize = 64;
/// Cgroups that one walk for ids visits.
const VISITS_CAP: usize = 65_536;
/// Work that is done without a pause when there was none before.
const BURST: Duration = Duration::from_millis(50);
/// Share of the time that is spent working on average: one part in so many.
const SHARE: u32 = 50;
/// Length of a pause.
const PAUSE: Duration = Duration::from_millis(20);

/// What the thread is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// The cgroup with this id.
    Id(u64),
    /// The same, for a kill that waits for it.
    Urgent(u64),
    /// The same, with its memory.oom_control, though it was answered lately.
    Control(u64),
    /// As many cgroups as the engine follows, those near the root first.
    All,
}

/// A cgroup that was found.
#[derive(Debug)]
pub(super) struct Answer {
    /// What the engine gets.
    pub(super) cgroup: CgroupFound,
    /// Its memory.oom_control, if that was asked for and there is one.
    pub(super) control: Option<ControlFile>,
}

/// What an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    /// A kill or a watch that waits for it.
    Kill,
    /// Anything else.
    Curve,
}

/// The recorder's end.
#[derive(Debug)]
pub(super) struct Asker {
    asks: SyncSender<Ask>,
    /// Asks that the thread has not taken. Cap: [`QUEUE_CAP`], and one on its way.
    asked: Arc<AtomicUsize>,
    found: Receiver<Answer>,
    /// What a kill waits for.
    found_for_kill: Receiver<Answer>,
}

impl Asker {
    /// Starts the thread, which ends when this is dropped. `None` when there can be no thread.
    pub(super) fn start(hierarchy: Hierarchy) -> Option<Self> {
        let (asker, lookups) = Self::pair(hierarchy);
        let run = move || {
            ASKER.keep_capabilities();
            lookups.run();
        };
        thread::Builder::new().name(ASKER.thread.to_owned()).spawn(run).ok()?;
        Some(asker)
    }

    /// Both ends.
    fn pair(hierarchy: Hierarchy) -> (Self, Lookups) {
        let (asks, to_do) = sync_channel(QUEUE_CAP);
        let (answers, found) = sync_channel(QUEUE_CAP);
        let (answers_for_kill, found_for_kill) = sync_channel(QUEUE_CAP);
        let asked = Arc::new(AtomicUsize::new(0));
        let lookups = Lookups::new(hierarchy, Asks { to_do, asked: asked.clone() }, [answers, answers_for_kill]);
        (Self { asks, asked, found, found_for_kill }, lookups)
    }

    /// Asks; false when the queue is full. Never waits.
    pub(super) fn ask(&self, ask: Ask) -> bool {
        let cap = if matches!(ask, Ask::Urgent(_)) { QUEUE_CAP } else { ORDINARY_CAP };
        if self.asked.load(Ordering::Relaxed) >= cap {
            return false;
        }
        self.asked.fetch_add(1, Ordering::Relaxed);
        let sent = self.asks.try_send(ask).is_ok();
        if !sent {
            self.asked.fetch_sub(1, Ordering::Relaxed);
        }
        sent
    }

    /// The answers that are there, at most `most`, those that a kill waits for first. Never waits.
    pub(super) fn answers(&self, most: usize) -> impl Iterator<Item = Answer> {
        self.found_for_kill.try_iter().chain(self.found.try_iter()).take(most)
    }
}

/// What the thread was asked for and has not taken.
#[derive(Debug)]
struct Asks {
    to_do: Receiver<Ask>,
    asked: Arc<AtomicUsize>,
}

impl Asks {
    /// Waits for the next one until a time; without one, until there is one.
    fn next(&self, until: Option<Instant>) -> Result<Ask, RecvTimeoutError> {
        let ask = match until {
            Some(until) => self.to_do.recv_timeout(until.saturating_duration_since(Instant::now())),
            None => self.to_do.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        self.asked.fetch_sub(usize::from(ask.is_ok()), Ordering::Relaxed);
        ask
    }

    /// The next one, if it is there.
    fn try_next(&self) -> Option<Ask> {
        let ask = self.to_do.try_recv().ok();
        self.asked.fetch_sub(usize::from(ask.is_some()), Ordering::Relaxed);
        ask
    }
}

/// What was looked up lately, and until when it is not looked up again.
#[derive(Debug, Default)]
struct Quiet {
    /// Whether it was found, and the time. Cap: [`QUIET_CAP`].
    until: BTreeMap<u64, (bool, Instant)>,
}

impl Quiet {
    fn has(&self, id: u64, now: Instant) -> bool {
        self.until.get(&id).is_some_and(|(_, until)| now < *until)
    }

    /// Whether no cgroup had this id.
    fn is_absent(&self, id: u64, now: Instant) -> bool {
        self.until.get(&id).is_some_and(|(found, until)| !found && now < *until)
    }

    fn add(&mut self, id: u64, found: bool, now: Instant) {
        if self.until.len() >= QUIET_CAP {
            self.until.retain(|_, (_, until)| now < *until);
        }
        if self.until.len() >= QUIET_CAP {
            self.until.clear();
        }
        self.until.insert(id, (found, now + if found { QUIET_FOUND } else { QUIET_ABSENT }));
    }
}

/// Time that may be worked: [`BURST`] at first, and one part in [`SHARE`] of the time that passes.
#[derive(Debug)]
struct Budget {
    left: Duration,
    at: Instant,
}

impl Budget {
    /// Takes note of work done since the last call. True when a pause is due.
    fn worked(&mut self, now: Instant) -> bool {
        self.left = self.left.saturating_sub(now.saturating_duration_since(self.at));
        self.at = now;
        self.left.is_zero()
    }

    /// Takes note of a time without work.
    fn rested(&mut self, now: Instant) {
        let earned = now.saturating_duration_since(self.at) / SHARE;
        self.left = self.left.saturating_add(earned).min(BURST);
        self.at = now;
    }
}

/// The thread's end.
struct Lookups {
    hierarchy: Hierarchy,
    /// `None` where ids are looked up by walks.
    by_id: Option<ById>,
    asked: Asks,
    answers: SyncSender<Answer>,
    /// Those that a kill waits for.
    answers_for_kill: SyncSender<Answer>,
    /// Cap: [`WAITING_CAP`].
    waiting: BTreeSet<u64>,
    /// What kills and watches wait for. Cap: [`WAITING_CAP`].
    urgent: BTreeSet<u64>,
    /// Those whose memory.oom_control is asked for. Cap: [`CONTROLS_CAP`].
    controls: BTreeSet<u64>,
    /// A list of all was asked for.
    all: bool,
    /// The recorder has ended.
    over: bool,
    quiet: Quiet,
    budget: Budget,
}

impl Lookups {
    fn new(hierarchy: Hierarchy, asked: Asks, [answers, answers_for_kill]: [SyncSender<Answer>; 2]) -> Self {
        Self {
            by_id: ById::new(&hierarchy),
            hierarchy,
            asked,
            answers,
            answers_for_kill,
            waiting: BTreeSet::new(),
            urgent: BTreeSet::new(),
            controls: BTreeSet::new(),
            all: false,
            over: false,
            quiet: Quiet::default(),
            budget: Budget { left: BURST, at: Instant::now() },
        }
    }

    fn run(mut self) {
        while !self.over {
            if self.urgent.is_empty() && self.waiting.is_empty() && !self.all {
                match self.asked.next(None) {
                    Ok(ask) => self.take(ask),
                    Err(_) => break,
                }
                self.budget.rested(Instant::now());
            }
            self.take_all();
            self.answer_urgent();
            if std::mem::take(&mut self.all) {
                self.list();
            }
            self.answer_waiting();
        }
    }

    fn take(&mut self, ask: Ask) {
        let now = Instant::now();
        match ask {
            Ask::Id(id) if self.waiting.len() < WAITING_CAP && !self.quiet.has(id, now) => {
                self.waiting.insert(id);
            }
            // There are few, so they are looked up at once where that needs no walk, also after one that found nothing.
            Ask::Control(id) if self.controls.len() < CONTROLS_CAP => {
                let asked = if self.by_id.is_some() { &mut self.urgent } else { &mut self.waiting };
                if asked.len() < WAITING_CAP {
                    self.controls.insert(id);
                    asked.insert(id);
                }
            }
            // One that was found may have been asked for before it was this urgent.
            Ask::Urgent(id) if self.urgent.len() < WAITING_CAP && !self.quiet.is_absent(id, now) => {
                self.urgent.insert(id);
            }
            Ask::Id(_) | Ask::Urgent(_) | Ask::Control(_) => {}
            Ask::All => self.all = true,
        }
    }

    /// Takes what was asked for, without waiting.
    fn take_all(&mut self) {
        while let Some(ask) = self.asked.try_next() {
            self.take(ask);
        }
    }

    /// Between two pieces of work: looks up what a kill waits for, and pauses when the budget is
    /// used up. False when the recorder has ended.
    fn may_go_on(&mut self) -> bool {
        self.take_all();
        self.answer_urgent();
        if self.budget.worked(Instant::now()) {
            self.pause();
        }
        !self.over
    }

    fn pause(&mut self) {
        let until = Instant::now() + PAUSE;
        loop {
            match self.asked.next(Some(until)) {
                Ok(ask) => self.take(ask),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => {
                    self.over = true;
                    break;
                }
            }
            self.answer_urgent();
        }
        self.budget.rested(Instant::now());
    }

    fn answer_urgent(&mut self) {
        let ids = std::mem::take(&mut self.urgent);
        let (watched, killed) = ids.into_iter().partition(|id| self.controls.contains(id));
        self.look_up(killed, For::Kill);
        self.look_up(watched, For::Kill);
    }

    fn answer_waiting(&mut self) {
        let ids = std::mem::take(&mut self.waiting);
        self.look_up(ids, For::Curve);
    }

    fn look_up(&mut self, ids: BTreeSet<u64>, wanted: For) {
        let left = self.answer_by_id(ids, wanted);
        if !left.is_empty() {
            self.walk(left, wanted);
        }
    }

    /// What a kill or a watch waits for is looked up at once, the rest in between.
    fn go_on(&mut self, wanted: For) -> bool {
        wanted == For::Kill || self.may_go_on()
    }

    /// Answers ids without a walk. Returns those that are left, which is all where that cannot be.
    fn answer_by_id(&mut self, mut ids: BTreeSet<u64>, wanted: For) -> BTreeSet<u64> {
        while let (Some(by_id), Some(id)) = (&self.by_id, ids.first().copied()) {
            match by_id.find(&self.hierarchy, id) {
                Some(dir) => self.answer(&dir, id, wanted),
                None => self.note_absent(id),
            }
            ids.remove(&id);
            if !self.go_on(wanted) {
                break;
            }
        }
        ids
    }

    /// Answers ids in one walk.
    fn walk(&mut self, mut ids: BTreeSet<u64>, wanted: For) {
        let hierarchy = self.hierarchy.clone();
        hierarchy.visit(VISITS_CAP, &mut |dir| {
            if let Some(id) = dir.id().filter(|id| ids.remove(id)) {
                self.answer(dir, id, wanted);
            }
            self.go_on(wanted) && !ids.is_empty()
        });
        if !self.over {
            ids.into_iter().for_each(|id| self.note_absent(id));
        }
    }

    fn note_absent(&mut self, id: u64) {
        self.controls.remove(&id);
        self.quiet.add(id, false, Instant::now());
    }

    fn answer(&mut self, dir: &CgroupDir, id: u64, wanted: For) {
        let control = self.controls.remove(&id).then(|| ControlFile::open(dir)).flatten();
        let answer = self.found(dir).filter(|answer| answer.cgroup.id == id);
        let answer = answer.map(|answer| Answer { control, ..answer });
        let answers = match wanted {
            For::Kill => &self.answers_for_kill,
            For::Curve => &self.answers,
        };
        // A full queue leaves it out, and who wants it asks again.
        if answer.is_some_and(|answer| answers.try_send(answer).is_ok()) {
            self.quiet.add(id, true, Instant::now());
        }
    }

    fn found(&self, dir: &CgroupDir) -> Option<Answer> {
        let cgroup = self.hierarchy.read_dir(dir, clock::boot_ns())?;
        Some(Answer { cgroup, control: None })
    }

    /// Lists cgroups for the engine, in between look-ups.
    fn list(&mut self) {
        let hierarchy = self.hierarchy.clone();
        let complete = hierarchy.visit(CGROUPS_CAP, &mut |dir| {
            let Some(mut answer) = self.found(dir) else { return true };
            while let Err(TrySendError::Full(back)) = self.answers.try_send(answer) {
                answer = back;
                self.pause();
                if self.over {
                    return false;
                }
            }
            self.may_go_on()
        });
        if !complete && !self.over {
            warn!(
                "more than {CGROUPS_CAP} memory cgroups, very deep ones, or some that cannot be read; the rest is looked up when it has work"
            );
        }
    }
}

#[cfg(test)]
mod tests;
