//! A cgroup's tree around a moment, as an incident shows it: who held memory, who had grown, what was
//! mapped, and the curve.

use memtrace_incident::{Growth, MappingNote, TaskRow};

use super::{Curve, Point, Sums, World};

/// Mapping notes of one incident.
pub(crate) const VIEW_NOTES_CAP: usize = 512;

/// The moments of an event, boot clock.
#[derive(Clone, Copy)]
pub(crate) struct Moments {
    /// Where the window begins.
    pub(crate) from_ns: u64,
    /// The event.
    pub(crate) at_ns: u64,
    /// When a victim was marked, a moment after its SIGKILL; elsewhere the event again.
    pub(crate) mark_ns: u64,
}

/// What to look at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ViewOf {
    /// Whose tree: `None` is the machine, an id that no cgroup has is nobody.
    pub(crate) tree: Option<u64>,
    /// Whose memory the composition is of.
    pub(crate) composition: Option<u64>,
    /// Whose curve.
    pub(crate) curve: Option<u64>,
}

/// Who held memory, who had grown and what was mapped where it ran out.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) tasks: Vec<TaskRow>,
    pub(crate) tasks_left_out: u64,
    pub(crate) growth: Vec<Growth>,
    pub(crate) notes: Vec<MappingNote>,
    /// Resident memory of the cgroup the composition is about.
    pub(crate) sums: Sums,
    pub(crate) curve_of: Option<u64>,
    pub(crate) curve_sums: Sums,
    pub(crate) curve: Curve,
    /// Points of the input at hand that the curve has already.
    seen: usize,
}

impl View {
    /// The curve ends at `until_ns`; `sums_of` is what a cgroup's tree held at the event.
    pub(crate) fn new(world: &World, of: ViewOf, when: Moments, until_ns: u64, sums_of: impl Fn(u64) -> Sums) -> Self {
        let (tasks, tasks_left_out) = world.tasks(of.tree);
        // Up to the mark, which has the victim's exact reading.
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

    /// Takes in what the input at hand put on the curve since the last time.
    pub(crate) fn follow(&mut self, world: &World) {
        if let Some(id) = self.curve_of {
            world.changes.points_of(id, self.seen).for_each(|point| self.curve.insert(point));
        }
        self.seen = world.changes.points.len();
    }

    /// The input is over: its points are numbered from 0 again.
    pub(crate) fn input_over(&mut self) {
        self.seen = 0;
    }

    /// Roughly what it takes.
    pub(crate) fn memory_estimate(&self) -> usize {
        self.curve.memory_estimate() + self.tasks.len() * 128
    }
}
