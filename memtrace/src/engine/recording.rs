//! A recording: everything that ran in one cgroup, or below one process, from begin to end.

use std::collections::BTreeMap;

use super::book::Book;
use super::builder::{Scene, allocations, cgroup, composition, losses, note};
use super::clock::Identity;
use super::decode::Reading;
use super::processes::{Key, ProcessRow};
use super::timeline::{Curve, Point, columns};
use super::verdict::{About, Case, judge};
use memtrace_incident::{Growth, Incident, Kind, Loss, MappingNote, Oom, RecordedProcess, Recording, SCHEMA, Timeline};

/// Processes listed.
pub(super) const LISTED_CAP: usize = 4096;
/// Processes held before the smallest dead ones are let go.
const HELD_CAP: usize = 2 * LISTED_CAP;
/// Mapping notes held before the smallest are let go.
const NOTES_CAP: usize = 4096;
const OOM_CAP: usize = 256;
/// Processes whose memory a process recording sums at every reading.
const SUMMED_CAP: usize = 1024;

/// What is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Subject {
    pub(super) cgroup_id: Option<u64>,
    pub(super) pid: Option<u32>,
    pub(super) command: Vec<String>,
    pub(super) boot_ns: u64,
}

/// How it ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ending {
    pub(super) boot_ns: u64,
    pub(super) exit_code: Option<i32>,
    pub(super) signal: Option<i32>,
    pub(super) cgroup_peak_bytes: Option<u64>,
}

#[derive(Clone, Debug)]
struct Member {
    key: Key,
    live: bool,
    process: RecordedProcess,
}

/// A recording in progress.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) subject: Subject,
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

impl State {
    pub(super) fn begin(subject: Subject, book: &Book, loss_base: BTreeMap<String, u64>) -> Self {
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
        state.rescan(book);
        state
    }

    /// The cgroup that is followed, when one is.
    pub(super) fn cgroup(&self) -> Option<u64> {
        self.subject.cgroup_id
    }

    /// Looks at every live process again, if the shape of the cgroup tree was learnt since.
    pub(super) fn rescan_if_reshaped(&mut self, book: &Book) {
        if self.subject.cgroup_id.is_some() && self.reshaped != book.cgroups.reshaped {
            self.rescan(book);
        }
    }

    fn rescan(&mut self, book: &Book) {
        self.reshaped = book.cgroups.reshaped;
        let live: Vec<&ProcessRow> = book.processes.iter().filter(|row| row.exited.is_none()).collect();
        // Children of a followed process may come before it in the table: go down generation by generation.
        for _ in 0..64 {
            let before = self.members.len();
            live.iter().for_each(|row| self.consider(book, row));
            if self.subject.pid.is_none() || self.members.len() == before {
                break;
            }
        }
    }

    /// Something was learnt about a process.
    pub(super) fn observe(&mut self, book: &Book, key: Key) {
        if let Some(row) = book.processes.get(key) {
            self.consider(book, row);
        }
    }

    fn consider(&mut self, book: &Book, row: &ProcessRow) {
        if !self.members.contains_key(&row.serial) && !self.wants(book, row) {
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

    fn wants(&self, book: &Book, row: &ProcessRow) -> bool {
        if row.exited.is_some_and(|(ns, _)| ns < self.subject.boot_ns) {
            return false;
        }
        if let Some(root) = self.subject.cgroup_id {
            return row.cgroup.is_some_and(|id| book.cgroups.in_tree(id, root));
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

    /// A new point of some curve.
    pub(super) fn point(&mut self, book: &Book, cgroup: u64, point: Point) {
        if self.subject.cgroup_id == Some(cgroup) {
            self.curve.insert(point);
            self.capture(book, &point);
        }
    }

    /// A followed process' memory moved: for a process recording that is the curve.
    pub(super) fn moved(&mut self, book: &Book, key: Key, boot_ns: u64) {
        let followed = self.subject.pid.is_some() && self.subject.cgroup_id.is_none();
        let Some(row) = book.processes.get(key).filter(|_| followed) else { return };
        if self.members.contains_key(&row.serial) {
            let live = self.members.values().filter(|m| m.live).take(SUMMED_CAP);
            let point = Point::new(boot_ns, &Reading::default(), book.sum_over(live.map(|m| m.key)));
            self.curve.insert(point);
            self.capture(book, &point);
        }
    }

    /// Who had grown, at the highest reading; taken anew whenever that is a twentieth higher.
    fn capture(&mut self, book: &Book, point: &Point) {
        let height = point.usage().unwrap_or(point.sums.resident());
        if height > self.captured.saturating_add(self.captured / 20) {
            self.captured = height;
            self.growth = book.growth(point.boot_ns, |row| self.members.contains_key(&row.serial));
        }
    }

    pub(super) fn mapped(&mut self, book: &Book, cgroup: u64, note: &MappingNote) {
        let wanted = match self.subject.cgroup_id {
            Some(root) => book.cgroups.in_tree(cgroup, root),
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
    pub(super) fn concerns(&self, book: &Book, cgroup: Option<u64>, pid: u32) -> bool {
        match self.subject.cgroup_id {
            Some(root) => cgroup.is_some_and(|id| book.cgroups.in_tree(id, root)),
            None => self.members.values().any(|m| m.key.0 == pid),
        }
    }

    pub(super) fn oom_incident(&mut self, id: String) {
        if self.oom_ids.len() < OOM_CAP {
            self.oom_ids.push(id);
        }
    }

    pub(super) fn keep_oom(&mut self, incident: &Incident) {
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
    pub(super) fn exec(&mut self, key: Key, boot_ns: u64) {
        if self.members.len() == 1 && self.members.values().any(|m| m.key == key) {
            self.captured = 0;
            self.growth.clear();
            self.grown_since_ns = boot_ns;
        }
    }

    pub(super) fn memory_estimate(&self) -> usize {
        self.members.len() * (size_of::<Member>() + 32) + self.curve.memory_estimate() + self.notes.len() * 128
    }

    /// Ids of OOM kills that happened in it.
    pub(super) fn oom_ids(&self) -> &[String] {
        &self.oom_ids
    }

    /// The file. Growth, composition and verdict are those of the highest reading; `at` is the end.
    pub(super) fn end(mut self, ending: &Ending, open_oom: Option<Oom>, scene: &Scene<'_>) -> Incident {
        let keys: Vec<Key> = self.members.values().map(|m| m.key).collect();
        keys.into_iter().for_each(|key| self.observe(scene.book, key));
        let main = self.subject.pid.and_then(|pid| {
            let of_pid = self.members.values().find(|m| m.key.0 == pid)?;
            scene.book.processes.get(of_pid.key)?.cgroup
        });
        let id = self.subject.cgroup_id.or(main);
        let last = id.and_then(|id| scene.book.cgroups.get(id)).map(|row| row.last).unwrap_or_default();
        let mut about = cgroup(id, &last, scene);
        let peak = self.curve.peak().copied();
        if self.subject.cgroup_id.is_some() {
            let highest = peak.and_then(|p| p.usage());
            about.peak_bytes = about.peak_bytes.max(ending.cgroup_peak_bytes).max(highest);
        }
        let (columns, thinned) = columns(self.curve.rows());
        let timeline = Timeline { columns, thinned };
        let usage = peak.and_then(|p| p.usage());
        let sums = peak.map(|p| p.sums).unwrap_or_default();
        let composition = composition(usage, &sums);
        let verdict = judge(&Case {
            about: About::Recording,
            path: about.path.as_deref(),
            at_ns: peak.map_or(ending.boot_ns, |p| p.boot_ns),
            usage: about.peak_bytes.filter(|_| self.subject.cgroup_id.is_some()).or(peak.map(|p| p.sums.resident())),
            limit: about.limit_bytes,
            curve: &timeline.columns,
            tasks: &[],
            growth: &self.growth,
            composition: &composition,
        });
        let mut lost = losses(&self.loss_base, thinned, scene);
        note(&mut lost, Loss::MappingsNotListed, self.notes_let_go);
        lost.sort();
        let root = self.subject.cgroup_id;
        let keys: std::collections::BTreeSet<Key> = self.members.values().map(|m| m.key).collect();
        let window = (self.subject.boot_ns.max(self.grown_since_ns), ending.boot_ns);
        let (allocation_paths, allocations) = allocations(scene, window, &lost, |cgroup, key| match root {
            Some(root) => scene.book.cgroups.in_tree(cgroup, root),
            None => keys.contains(&key),
        });
        self.notes.sort_by_key(|n| (n.boot_ns, n.pid, n.address));
        let mut processes: Vec<RecordedProcess> = self.members.into_values().map(|m| m.process).collect();
        processes.sort_by_key(|p| (std::cmp::Reverse(p.peak_bytes), p.start_boot_ns, p.pid));
        let left_out = processes.len().saturating_sub(LISTED_CAP) as u64;
        processes.truncate(LISTED_CAP);
        let identity = Identity {
            kind: "recording",
            boot_id: &scene.host.boot_id,
            boot_ns: ending.boot_ns,
            pid: self.subject.pid.unwrap_or(0),
            start_boot_ns: self.subject.boot_ns,
        };
        Incident {
            schema: SCHEMA,
            id: scene.clock.incident_id(&identity),
            kind: Kind::Recording,
            at: scene.clock.at(ending.boot_ns),
            host: scene.host.clone(),
            cgroup: about,
            oom: open_oom.or(self.oom),
            pressure: None,
            recording: Some(Recording {
                command: self.subject.command,
                start_boot_ns: self.subject.boot_ns,
                duration_ns: ending.boot_ns.saturating_sub(self.subject.boot_ns),
                exit_code: ending.exit_code,
                signal: ending.signal,
                processes,
                processes_left_out: self.let_go.saturating_add(left_out),
                oom_incidents: self.oom_ids,
            }),
            timeline,
            growth: self.growth,
            mappings: self.notes,
            allocation_paths,
            allocations,
            composition,
            verdict,
            losses: lost,
        }
    }
}
