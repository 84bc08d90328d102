//! The state of a cgroup's subtree around an event, as an incident shows it: the processes and
//! their memory, their growth, mapping calls, and the curve. It is copied at the event, because
//! victims exit and tables change before the incident is built. Only the curve grows after it.

use memtrace_incident::{Growth, MappingNote, TaskRow};

use super::{Curve, Point, Sums, World};

/// Mapping notes of one incident; the oldest are left out.
pub(crate) const VIEW_NOTES_CAP: usize = 512;

/// The times of an event, boot clock, nanoseconds.
#[derive(Clone, Copy)]
pub(crate) struct Moments {
    /// Begin of the window.
    pub(crate) from_ns: u64,
    /// Time of the event.
    pub(crate) at_ns: u64,
    /// When the victim was marked, shortly after its SIGKILL; for other events the same as `at_ns`.
    pub(crate) mark_ns: u64,
}

/// The cgroups that a view is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ViewOf {
    /// The subtree whose processes are listed. `None` is the machine; an id that no cgroup has
    /// lists no process.
    pub(crate) tree: Option<u64>,
    /// The cgroup whose composition is shown.
    pub(crate) composition: Option<u64>,
    /// The cgroup whose curve is shown.
    pub(crate) curve: Option<u64>,
}

/// The state of a subtree around an event.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) tasks: Vec<TaskRow>,
    pub(crate) tasks_left_out: u64,
    pub(crate) growth: Vec<Growth>,
    pub(crate) notes: Vec<MappingNote>,
    /// Resident memory of the cgroup whose composition is shown.
    pub(crate) sums: Sums,
    pub(crate) curve_of: Option<u64>,
    pub(crate) curve_sums: Sums,
    pub(crate) curve: Curve,
    /// How many points of the current input the curve has already.
    seen: usize,
}

impl View {
    /// Copies the state. The curve ends at `until_ns`; `sums_of` gives what a cgroup's subtree held
    /// at the event.
    pub(crate) fn new(world: &World, of: ViewOf, when: Moments, until_ns: u64, sums_of: impl Fn(u64) -> Sums) -> Self {
        let (tasks, tasks_left_out) = world.tasks(of.tree);
        // Growth up to the mark, because the mark has the exact reading of the victim.
        let growth = world.growth(when.at_ns.max(when.mark_ns), |row| world.in_scope(row, of.tree));
        let mut curve = Curve::default();
        let rows = of.curve.into_iter().flat_map(|id| world.cgroups.rows(id, when.from_ns..=until_ns));
        rows.for_each(|point: &Point| curve.insert(*point));
        Self {
            tasks,
            tasks_left_out,
            growth,
            notes: world.notes(of.tree, when.from_ns, when.at_ns, VIEW_NOTES_CAP),
            sums: of.composition.map(&sums_of).unwrap_or_default(),
            curve_of: of.curve,
            curve_sums: of.curve.map(&sums_of).unwrap_or_default(),
            curve,
            seen: world.changes.points.len(),
        }
    }

    /// Takes in the new points of the current input since the last call.
    pub(crate) fn follow(&mut self, world: &World) {
        if let Some(id) = self.curve_of {
            world.changes.points_of(id, self.seen).for_each(|point| self.curve.insert(point));
        }
        self.seen = world.changes.points.len();
    }

    /// The input has ended. Points of the next input are numbered from 0.
    pub(crate) fn input_over(&mut self) {
        self.seen = 0;
    }

    /// Estimated memory in bytes.
    pub(crate) fn memory_estimate(&self) -> usize {
        self.curve.memory_estimate() + self.tasks.len() * 128
    }
}
