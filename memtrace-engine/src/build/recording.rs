//! A recording: everything that ran in one cgroup, or below one process, from begin to end.

use std::collections::BTreeMap;

use memtrace_incident::{Growth, Incident, Kind, Loss, LossNote, MappingNote, Oom, RecordedProcess, Recording};

use super::verdict::About;
use super::{Draft, Scene, cgroup};
use crate::clock::Identity;
use crate::decode::Reading;
use crate::output::{Finding, Output};
use crate::world::{Curve, Point, ProcessKey, ProcessRow, World};

/// Processes listed.
pub(super) const LISTED_CAP: usize = 4096;
/// Processes held before the smallest dead ones are let go.
const HELD_CAP: usize = 2 * LISTED_CAP;
/// Mapping notes held before the smallest are let go.
pub(super) const NOTES_CAP: usize = 4096;
pub(super) const OOM_CAP: usize = 256;
/// Processes whose memory a process recording sums at every reading.
const SUMMED_CAP: usize = 1024;

/// What is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) cgroup_id: Option<u64>,
    pub(crate) pid: Option<u32>,
    pub(crate) command: Vec<String>,
    pub(crate) boot_ns: u64,
}

/// How it ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ending {
    pub(crate) boot_ns: u64,
    pub(crate) exit_code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) cgroup_peak_bytes: Option<u64>,
}

#[derive(Clone, Debug)]
struct Member {
    key: ProcessKey,
    live: bool,
    process: RecordedProcess,
}

/// A recording in progress.
#[derive(Clone, Debug)]
pub(crate) struct RecordingState {
    pub(crate) subject: Subject,
    /// By the process' serial.
    members: BTreeMap<u64, Member>,
    let_go: u64,
    curve: Curve,
    notes: Vec<MappingNote>,
    notes_let_go: u64,
    /// As of the highest reading.
    growth: Vec<Growth>,
    captured: u64,
    /// From when on growth is told with its stacks.
    grown_since_ns: u64,
    oom_ids: Vec<String>,
    oom: Option<Oom>,
    /// Shape of the cgroup tree when all processes were looked at.
    reshaped: u64,
    loss_base: BTreeMap<String, u64>,
}

/// Whether the kernel's peak is of the program that ran last. It survives exec and, after vfork, begins with the
/// parent's; more than the hook ever saw of this image, beyond what its quantum and late pages explain, is not its own.
fn is_its_own(kernel: u64, peak: Option<u64>) -> bool {
    const SLACK_BYTES: u64 = 1 << 20;
    peak.is_some_and(|peak| kernel <= peak.saturating_add(SLACK_BYTES))
}

impl RecordingState {
    pub(crate) fn begin(subject: Subject, world: &World, loss_base: BTreeMap<String, u64>) -> Self {
        let mut state = Self {
            subject,
            members: BTreeMap::new(),
            let_go: 0,
            curve: Curve::default(),
            notes: Vec::new(),
            notes_let_go: 0,
            growth: Vec::new(),
            captured: 0,
            grown_since_ns: 0,
            oom_ids: Vec::new(),
            oom: None,
            reshaped: 0,
            loss_base,
        };
        state.rescan(world);
        state
    }

    /// The cgroup that is followed, when one is.
    pub(crate) fn cgroup(&self) -> Option<u64> {
        self.subject.cgroup_id
    }

    /// Looks at every live process again, if the shape of the cgroup tree was learnt since.
    fn rescan_if_reshaped(&mut self, world: &World) {
        if self.subject.cgroup_id.is_some() && self.reshaped != world.cgroups.reshaped {
            self.rescan(world);
        }
    }

    fn rescan(&mut self, world: &World) {
        self.reshaped = world.cgroups.reshaped;
        let live: Vec<&ProcessRow> = world.processes.iter().filter(|row| row.exited.is_none()).collect();
        // Children of a followed process may come before it in the table: go down generation by generation.
        for _ in 0..64 {
            let before = self.members.len();
            live.iter().for_each(|row| self.consider(world, row));
            if self.subject.pid.is_none() || self.members.len() == before {
                break;
            }
        }
    }

    /// Follows what an input changed, and what came of it.
    pub(crate) fn follow(&mut self, world: &World, news: &[Output]) {
        let changes = &world.changes;
        changes.processes.iter().for_each(|key| self.observe(world, *key));
        self.rescan_if_reshaped(world);
        if let Some((key, boot_ns)) = changes.moved {
            self.moved(world, key, boot_ns);
        }
        if let Some((key, boot_ns)) = changes.exec {
            self.exec(key, boot_ns);
        }
        if let Some((cgroup, note)) = &changes.mapped {
            self.mapped(world, *cgroup, note);
        }
        for output in news {
            match output {
                Output::Alert(Finding::OomKill { incident, cgroup_id, pid, .. })
                    if self.concerns(world, *cgroup_id, *pid) =>
                {
                    self.oom_incident(incident.clone());
                }
                Output::Save(incident) => self.keep_oom(incident),
                _ => {}
            }
        }
        if let Some(id) = self.subject.cgroup_id {
            changes.points_of(id, 0).for_each(|point| self.point(world, point));
        }
    }

    fn observe(&mut self, world: &World, key: ProcessKey) {
        if let Some(row) = world.processes.get(key) {
            self.consider(world, row);
        }
    }

    fn consider(&mut self, world: &World, row: &ProcessRow) {
        if !self.members.contains_key(&row.serial) && !self.wants(world, row) {
            return;
        }
        let process = RecordedProcess {
            pid: row.pid,
            start_boot_ns: row.start_boot_ns,
            comm: row.comm.clone(),
            peak_bytes: row.peak,
            max_rss_bytes: row.max_rss.filter(|kernel| is_its_own(*kernel, row.peak)),
            exit_code: row.exited.and_then(|(_, code)| code),
        };
        self.members.insert(row.serial, Member { key: row.key(), live: row.exited.is_none(), process });
        if self.members.len() > HELD_CAP {
            self.shrink();
        }
    }

    fn wants(&self, world: &World, row: &ProcessRow) -> bool {
        if row.exited.is_some_and(|(ns, _)| ns < self.subject.boot_ns) {
            return false;
        }
        if let Some(root) = self.subject.cgroup_id {
            return row.cgroup.is_some_and(|id| world.cgroups.in_tree(id, root));
        }
        let Some(pid) = self.subject.pid else { return false };
        if row.pid == pid || row.parent_serial.is_some_and(|p| self.members.contains_key(&p)) {
            return true;
        }
        let found_running = row.parent_serial.is_none() && row.parent_pid != 0;
        found_running
            && self.members.values().any(|m| m.live && m.key.0 == row.parent_pid && m.key.1 <= row.start_boot_ns)
    }

    fn shrink(&mut self) {
        let mut order: Vec<(bool, Option<u64>, u64)> =
            self.members.iter().map(|(serial, m)| (m.live, m.process.peak_bytes, *serial)).collect();
        order.sort_unstable();
        let excess = order.len().saturating_sub(LISTED_CAP);
        for (_, _, serial) in order.into_iter().take(excess) {
            self.members.remove(&serial);
            self.let_go += 1;
        }
    }

    /// A new point of the cgroup's curve.
    fn point(&mut self, world: &World, point: Point) {
        self.curve.insert(point);
        self.capture(world, &point);
    }

    /// A followed process' memory moved: for a process recording that is the curve.
    fn moved(&mut self, world: &World, key: ProcessKey, boot_ns: u64) {
        let followed = self.subject.pid.is_some() && self.subject.cgroup_id.is_none();
        let Some(row) = world.processes.get(key).filter(|_| followed) else { return };
        if self.members.contains_key(&row.serial) {
            let live = self.members.values().filter(|m| m.live).take(SUMMED_CAP);
            let point = Point::new(boot_ns, &Reading::default(), world.sum_over(live.map(|m| m.key)));
            self.curve.insert(point);
            self.capture(world, &point);
        }
    }

    /// Who had grown, at the highest reading; taken anew whenever that is a twentieth higher.
    fn capture(&mut self, world: &World, point: &Point) {
        let height = point.usage().unwrap_or(point.sums.resident());
        if height > self.captured.saturating_add(self.captured / 20) {
            self.captured = height;
            self.growth = world.growth(point.boot_ns, |row| self.members.contains_key(&row.serial));
        }
    }

    fn mapped(&mut self, world: &World, cgroup: u64, note: &MappingNote) {
        let wanted = match self.subject.cgroup_id {
            Some(root) => world.cgroups.in_tree(cgroup, root),
            None => self.members.values().any(|m| m.live && m.key.0 == note.pid),
        };
        if !wanted {
            return;
        }
        self.notes.push(note.clone());
        if self.notes.len() > NOTES_CAP {
            self.notes.sort_by_key(|n| (std::cmp::Reverse(n.change_bytes.unsigned_abs()), n.boot_ns));
            let excess = self.notes.len().saturating_sub(NOTES_CAP / 2);
            self.notes.truncate(NOTES_CAP / 2);
            self.notes_let_go += excess as u64;
        }
    }

    /// A kill in this cgroup, or of a followed process, belongs to the recording.
    fn concerns(&self, world: &World, cgroup: Option<u64>, pid: u32) -> bool {
        match self.subject.cgroup_id {
            Some(root) => cgroup.is_some_and(|id| world.cgroups.in_tree(id, root)),
            None => self.members.values().any(|m| m.key.0 == pid),
        }
    }

    fn oom_incident(&mut self, id: String) {
        if self.oom_ids.len() < OOM_CAP {
            self.oom_ids.push(id);
        }
    }

    fn keep_oom(&mut self, incident: &Incident) {
        if self.oom_ids.contains(&incident.id) {
            self.oom.clone_from(&incident.oom);
            // At the limit every reading is about as high; the one that tells is from before the victim was gone.
            let usage = incident.cgroup.usage_bytes.unwrap_or(0);
            if usage.saturating_add(usage / 20) >= self.captured && self.subject.cgroup_id.is_some() {
                self.captured = self.captured.max(usage);
                self.growth.clone_from(&incident.growth);
            }
        }
    }

    /// A process became another program. While it is the only one, the recording begins anew: what held memory until
    /// now was whoever started the command.
    fn exec(&mut self, key: ProcessKey, boot_ns: u64) {
        if self.members.len() == 1 && self.members.values().any(|m| m.key == key) {
            self.captured = 0;
            self.growth.clear();
            self.grown_since_ns = boot_ns;
        }
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        self.members.len() * (size_of::<Member>() + 32) + self.curve.memory_estimate() + self.notes.len() * 128
    }

    /// Ids of OOM kills that happened in it.
    pub(crate) fn oom_ids(&self) -> &[String] {
        &self.oom_ids
    }
}

/// The file. Growth, composition and verdict are those of the highest reading; `at` is the end. `open_oom` is the OOM
/// kill in it that has not been closed yet.
pub(crate) fn end(mut state: RecordingState, ending: &Ending, open_oom: Option<Oom>, scene: &Scene<'_>) -> Incident {
    let keys: Vec<ProcessKey> = state.members.values().map(|m| m.key).collect();
    keys.into_iter().for_each(|key| state.observe(scene.world, key));
    let root = state.subject.cgroup_id;
    let peak = state.curve.peak().copied();
    let about = recorded_cgroup(&state, ending, peak.as_ref(), scene);
    let keys: std::collections::BTreeSet<ProcessKey> = state.members.values().map(|m| m.key).collect();
    state.notes.sort_by_key(|n| (n.boot_ns, n.pid, n.address));
    let identity = Identity {
        kind: Kind::Recording.name(),
        boot_id: &scene.run.host.boot_id,
        boot_ns: ending.boot_ns,
        pid: state.subject.pid.unwrap_or(0),
        start_boot_ns: state.subject.boot_ns,
    };
    let in_scope = |cgroup: u64, key: ProcessKey| match root {
        Some(root) => scene.world.cgroups.in_tree(cgroup, root),
        None => keys.contains(&key),
    };
    let draft = Draft {
        kind: Kind::Recording,
        id: scene.run.clock.incident_id(&identity),
        at_ns: ending.boot_ns,
        usage: peak.and_then(|p| p.usage()),
        sums: peak.map(|p| p.sums).unwrap_or_default(),
        about: About::Recording,
        verdict_at_ns: peak.map_or(ending.boot_ns, |p| p.boot_ns),
        verdict_usage: about.peak_bytes.filter(|_| root.is_some()).or(peak.map(|p| p.sums.resident())),
        verdict_limit: about.limit_bytes,
        verdict_path: about.path.clone(),
        tasks: &[],
        growth: &state.growth,
        mappings: &state.notes,
        loss_base: &state.loss_base,
        losses: LossNote::counted(Loss::MappingsNotListed, state.notes_let_go).into_iter().collect(),
        window: (state.subject.boot_ns.max(state.grown_since_ns), ending.boot_ns),
        in_scope: &in_scope,
        cgroup: about,
    };
    let mut incident = draft.build(state.curve.rows(), scene);
    incident.oom = open_oom.or(state.oom);
    incident.recording = Some(recording(state.subject, ending, state.members, state.let_go, state.oom_ids));
    incident
}

/// The cgroup that was recorded, or the one that the recorded process is in.
fn recorded_cgroup(
    state: &RecordingState,
    ending: &Ending,
    peak: Option<&Point>,
    scene: &Scene<'_>,
) -> memtrace_incident::Cgroup {
    let main = state.subject.pid.and_then(|pid| {
        let of_pid = state.members.values().find(|m| m.key.0 == pid)?;
        scene.world.processes.get(of_pid.key)?.cgroup
    });
    let id = state.subject.cgroup_id.or(main);
    let last = id.and_then(|id| scene.world.cgroups.get(id)).map(|row| row.last).unwrap_or_default();
    let mut about = cgroup(id, &last, scene);
    if state.subject.cgroup_id.is_some() {
        let highest = peak.and_then(Point::usage);
        about.peak_bytes = about.peak_bytes.max(ending.cgroup_peak_bytes).max(highest);
    }
    about
}

/// What was recorded, with its processes by peak.
fn recording(
    subject: Subject,
    ending: &Ending,
    members: BTreeMap<u64, Member>,
    let_go: u64,
    oom_incidents: Vec<String>,
) -> Recording {
    let mut processes: Vec<RecordedProcess> = members.into_values().map(|m| m.process).collect();
    processes.sort_by_key(|p| (std::cmp::Reverse(p.peak_bytes), p.start_boot_ns, p.pid));
    let left_out = processes.len().saturating_sub(LISTED_CAP) as u64;
    processes.truncate(LISTED_CAP);
    Recording {
        command: subject.command,
        start_boot_ns: subject.boot_ns,
        duration_ns: ending.boot_ns.saturating_sub(subject.boot_ns),
        exit_code: ending.exit_code,
        signal: ending.signal,
        processes,
        processes_left_out: let_go.saturating_add(left_out),
        oom_incidents,
    }
}
