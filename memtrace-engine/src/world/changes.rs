//! What one input changed in the world. Curves and recordings follow it after the input, once, in
//! one place: nobody has to be told by hand where something is learnt.

use memtrace_incident::MappingNote;

use super::{Point, ProcessKey};

/// Changes of the input at hand. An input touches a few processes, and one cgroup with its ancestors.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    /// Points put on the curves of cgroups, by kernfs id.
    pub(crate) points: Vec<(u64, Point)>,
    /// Processes something was learnt about.
    pub(crate) processes: Vec<ProcessKey>,
    /// A process whose resident memory moved, and when.
    pub(crate) moved: Option<(ProcessKey, u64)>,
    /// A process that became another program, and when.
    pub(crate) exec: Option<(ProcessKey, u64)>,
    /// A mapping call, with the cgroup it happened in.
    pub(crate) mapped: Option<(u64, MappingNote)>,
}

impl Changes {
    /// Forgets them: everybody has followed.
    pub(crate) fn clear(&mut self) {
        self.points.clear();
        self.processes.clear();
        (self.moved, self.exec, self.mapped) = (None, None, None);
    }

    /// Points that a cgroup's curve got, of those after the first `seen` of this input.
    pub(crate) fn points_of(&self, cgroup: u64, seen: usize) -> impl Iterator<Item = Point> + '_ {
        let after = self.points.iter().skip(seen);
        after.filter(move |(id, _)| *id == cgroup).map(|(_, point)| *point)
    }
}
