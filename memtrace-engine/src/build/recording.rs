//! A recording: everything that ran in the subtree of a cgroup, or in a process and its
//! descendants, from begin to end.
//!
//! It takes in the changes of every input, because it may last longer than the history of the
//! world. Its growth and composition are those at the highest usage, which is what a reader wants
//! to explain.

use std::collections::BTreeMap;

use memtrace_incident::{Growth, Incident, Kind, Loss, LossNote, MappingNote, Oom, RecordedProcess, Recording};

use super::verdict::About;
use super::{BuildContext, Draft, cgroup};
use crate::clock::Identity;
use crate::decode::Reading;
use crate::output::{Finding, Output};
use crate::world::{Curve, Point, ProcessKey, ProcessRow, World};

/// Processes that the file lists; further ones are counted.
pub(super) const LISTED_CAP: usize = 4096;
/// Processes in memory. At the cap exited ones with the lowest peak are dropped and counted.
const HELD_CAP: usize = 2 * LISTED_CAP;
/// Mapping notes. At the cap the smaller half is dropped and counted.
pub(super) const NOTES_CAP: usize = 4096;
/// OOM kills that the file lists; further ones are left out.
pub(super) const OOM_CAP: usize = 256;
/// Processes whose memory a recording of a process sums at every reading; further ones are left
/// out.
const SUMMED_CAP: usize = 1024;

/// What is recorded: a cgroup or a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecordingSubject {
    pub(crate) cgroup_id: Option<u64>,
    pub(crate) pid: Option<u32>,
    pub(crate) command: Vec<String>,
    pub(crate) boot_ns: u64,
}

/// How a recording ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RecordingEnd {
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
    pub(crate) subject: RecordingSubject,
    /// By serial of the process. Cap: [`HELD_CAP`].
    members: BTreeMap<u64, Member>,
    /// Members that were dropped at the cap.
    dropped: u64,
    curve: Curve,
    /// Cap: [`NOTES_CAP`].
    notes: Vec<MappingNote>,
    /// Notes that were dropped at the cap.
    notes_dropped: u64,
    /// Growth of processes at the highest reading. Cap: [`crate::world::GROWTH_CAP`].
    growth: Vec<Growth>,
    /// Height of the curve when `growth` was taken, bytes.
    captured_bytes: u64,
    /// Growth before this time is not reported, boot clock.
    grown_since_ns: u64,
    /// Ids of OOM incidents during the recording. Cap: [`OOM_CAP`].
    oom_ids: Vec<String>,
    /// The latest OOM kill that was closed.
    oom: Option<Oom>,
    /// [`crate::world::Cgroups::reshaped`] when all processes were last checked.
    reshaped: u64,
    /// Loss totals at the begin.
    loss_base: BTreeMap<String, u64>,
}

/// Whether the kernel's peak (`signal->maxrss`) is of the program that ran last. It survives exec
/// and, after vfork, begins with that of the parent. A peak that exceeds what the hook saw of this
/// program by more than the RSS threshold and late pages explain belongs to an earlier one.
fn is_of_last_program(kernel: u64, peak: Option<u64>) -> bool {
    const SLACK_BYTES: u64 = 1 << 20;
    peak.is_some_and(|peak| kernel <= peak.saturating_add(SLACK_BYTES))
}

impl RecordingState {
    pub(crate) fn begin(subject: RecordingSubject, world: &World, loss_base: BTreeMap<String, u64>) -> Self {
        let mut state = Self {
            subject,
            members: BTreeMap::new(),
            dropped: 0,
            curve: Curve::default(),
            notes: Vec::new(),
            notes_dropped: 0,
            growth: Vec::new(),
            captured_bytes: 0,
            grown_since_ns: 0,
            oom_ids: Vec::new(),
            oom: None,
            reshaped: 0,
            loss_base,
        };
        state.rescan(world);
        state
    }

    /// The recorded cgroup; `None` for a recording of a process.
    pub(crate) fn cgroup(&self) -> Option<u64> {
        self.subject.cgroup_id
    }

    /// Checks every live process again, if the cgroup tree changed since.
    fn rescan_if_reshaped(&mut self, world: &World) {
        if self.subject.cgroup_id.is_some() && self.reshaped != world.cgroups.reshaped {
            self.rescan(world);
        }
    }

    fn rescan(&mut self, world: &World) {
        self.reshaped = world.cgroups.reshaped;
        let live: Vec<&ProcessRow> = world.processes.iter().filter(|row| row.exited.is_none()).collect();
        // A child may come before its parent in the table, so each pass finds one more generation.
        for _ in 0..64 {
            let before = self.members.len();
            live.iter().for_each(|row| self.consider(world, row));
            if self.subject.pid.is_none() || self.members.len() == before {
                break;
            }
        }
    }

    /// Takes in what the current input changed, and the outputs that it led to.
    pub(crate) fn follow(&mut self, world: &World, new_outputs: &[Output]) {
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
        for output in new_outputs {
            match output {
                Output::Alert(Finding::OomKill { incident, cgroup_id, pid, .. })
                    if self.includes_kill(world, *cgroup_id, *pid) =>
                {
                    self.oom_incident(incident.clone());
                }
                Output::Save(incident) => self.take_oom(incident),
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
        if !self.members.contains_key(&row.serial) && !self.belongs(world, row) {
            return;
        }
        let process = RecordedProcess {
            pid: row.pid,
            start_boot_ns: row.start_boot_ns,
            comm: row.comm.clone(),
            peak_bytes: row.peak,
            max_rss_bytes: row.max_rss.filter(|kernel| is_of_last_program(*kernel, row.peak)),
            exit_code: row.exited.and_then(|(_, code)| code),
        };
        self.members.insert(row.serial, Member { key: row.key(), live: row.exited.is_none(), process });
        if self.members.len() > HELD_CAP {
            self.shrink();
        }
    }

    /// Whether a process belongs to the recording.
    fn belongs(&self, world: &World, row: &ProcessRow) -> bool {
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
            self.dropped += 1;
        }
    }

    /// The curve of the recorded cgroup has a new point.
    fn point(&mut self, world: &World, point: Point) {
        self.curve.insert(point);
        self.capture(world, &point);
    }

    /// Memory of a process moved. In a recording of a process, sums over the members are the curve.
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

    /// Takes the growth of processes at the highest reading, again whenever it is a twentieth
    /// higher.
    fn capture(&mut self, world: &World, point: &Point) {
        let height = point.usage().unwrap_or(point.sums.resident());
        if height > self.captured_bytes.saturating_add(self.captured_bytes / 20) {
            self.captured_bytes = height;
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
            self.notes_dropped += excess as u64;
        }
    }

    /// Whether a kill belongs to the recording: in the recorded cgroup, or of a member.
    fn includes_kill(&self, world: &World, cgroup: Option<u64>, pid: u32) -> bool {
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

    fn take_oom(&mut self, incident: &Incident) {
        if self.oom_ids.contains(&incident.id) {
            self.oom.clone_from(&incident.oom);
            // At the limit all readings are about as high. The growth of the incident is from
            // before the victim exited.
            let usage = incident.cgroup.usage_bytes.unwrap_or(0);
            if usage.saturating_add(usage / 20) >= self.captured_bytes && self.subject.cgroup_id.is_some() {
                self.captured_bytes = self.captured_bytes.max(usage);
                self.growth.clone_from(&incident.growth);
            }
        }
    }

    /// A process replaced its program. If it is the only member, the recording of growth starts
    /// again, because memory until now was that of the program which started the command.
    fn exec(&mut self, key: ProcessKey, boot_ns: u64) {
        if self.members.len() == 1 && self.members.values().any(|m| m.key == key) {
            self.captured_bytes = 0;
            self.growth.clear();
            self.grown_since_ns = boot_ns;
        }
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        self.members.len() * (size_of::<Member>() + 32) + self.curve.memory_estimate() + self.notes.len() * 128
    }

    /// Ids of OOM incidents during the recording.
    pub(crate) fn oom_ids(&self) -> &[String] {
        &self.oom_ids
    }
}

/// Builds the file. Growth, composition and verdict are those at the highest reading; `at` is the
/// end. `open_oom` is the OOM kill of an incident that is still open.
pub(crate) fn finish(
    mut state: RecordingState,
    end: &RecordingEnd,
    open_oom: Option<Oom>,
    context: &BuildContext<'_>,
) -> Incident {
    let keys: Vec<ProcessKey> = state.members.values().map(|m| m.key).collect();
    keys.into_iter().for_each(|key| state.observe(context.world, key));
    let root = state.subject.cgroup_id;
    let peak = state.curve.peak().copied();
    let about = recorded_cgroup(&state, end, peak.as_ref(), context);
    let keys: std::collections::BTreeSet<ProcessKey> = state.members.values().map(|m| m.key).collect();
    state.notes.sort_by_key(|n| (n.boot_ns, n.pid, n.address));
    let identity = Identity {
        kind: Kind::Recording.name(),
        boot_id: &context.run.host.boot_id,
        boot_ns: end.boot_ns,
        pid: state.subject.pid.unwrap_or(0),
        start_boot_ns: state.subject.boot_ns,
    };
    let in_scope = |cgroup: u64, key: ProcessKey| match root {
        Some(root) => context.world.cgroups.in_tree(cgroup, root),
        None => keys.contains(&key),
    };
    let draft = Draft {
        kind: Kind::Recording,
        id: context.run.clock.incident_id(&identity),
        at_ns: end.boot_ns,
        usage: peak.and_then(|p| p.usage()),
        sums: peak.map(|p| p.sums).unwrap_or_default(),
        about: About::Recording,
        verdict_at_ns: peak.map_or(end.boot_ns, |p| p.boot_ns),
        verdict_usage: about.peak_bytes.filter(|_| root.is_some()).or(peak.map(|p| p.sums.resident())),
        verdict_limit: about.limit_bytes,
        verdict_path: about.path.clone(),
        tasks: &[],
        growth: &state.growth,
        mappings: &state.notes,
        loss_base: &state.loss_base,
        losses: LossNote::counted(Loss::MappingsNotListed, state.notes_dropped).into_iter().collect(),
        window: (state.subject.boot_ns.max(state.grown_since_ns), end.boot_ns),
        in_scope: &in_scope,
        cgroup: about,
    };
    let mut incident = draft.build(state.curve.rows(), context);
    incident.oom = open_oom.or(state.oom);
    incident.recording = Some(recording(state.subject, end, state.members, state.dropped, state.oom_ids));
    incident
}

/// The recorded cgroup, or the one that the recorded process is in.
fn recorded_cgroup(
    state: &RecordingState,
    end: &RecordingEnd,
    peak: Option<&Point>,
    context: &BuildContext<'_>,
) -> memtrace_incident::Cgroup {
    let main = state.subject.pid.and_then(|pid| {
        let of_pid = state.members.values().find(|m| m.key.0 == pid)?;
        context.world.processes.get(of_pid.key)?.cgroup
    });
    let id = state.subject.cgroup_id.or(main);
    let last = id.and_then(|id| context.world.cgroups.get(id)).map(|row| row.last).unwrap_or_default();
    let mut about = cgroup(id, &last, context);
    if state.subject.cgroup_id.is_some() {
        let highest = peak.and_then(Point::usage);
        about.peak_bytes = about.peak_bytes.max(end.cgroup_peak_bytes).max(highest);
    }
    about
}

/// The part of the file about the recording, with processes by peak.
fn recording(
    subject: RecordingSubject,
    end: &RecordingEnd,
    members: BTreeMap<u64, Member>,
    dropped: u64,
    oom_incidents: Vec<String>,
) -> Recording {
    let mut processes: Vec<RecordedProcess> = members.into_values().map(|m| m.process).collect();
    processes.sort_by_key(|p| (std::cmp::Reverse(p.peak_bytes), p.start_boot_ns, p.pid));
    let left_out = processes.len().saturating_sub(LISTED_CAP) as u64;
    processes.truncate(LISTED_CAP);
    Recording {
        command: subject.command,
        start_boot_ns: subject.boot_ns,
        duration_ns: end.boot_ns.saturating_sub(subject.boot_ns),
        exit_code: end.exit_code,
        signal: end.signal,
        processes,
        processes_left_out: dropped.saturating_add(left_out),
        oom_incidents,
    }
}
