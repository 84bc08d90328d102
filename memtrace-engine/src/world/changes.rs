//! What one input changed in the world. Open incidents and the recording take it in once, at the
//! end of the input, so the code that changes the world does not have to know them.

use memtrace_incident::MappingNote;

use super::{Point, ProcessKey};

/// Changes of the current input. No caps are needed: an input changes a few processes, and up to
/// three cgroups with their ancestors.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    /// New points of curves, with the kernfs id of the cgroup.
    pub(crate) points: Vec<(u64, Point)>,
    /// Processes whose row changed.
    pub(crate) processes: Vec<ProcessKey>,
    /// The process whose resident memory moved, and when.
    pub(crate) moved: Option<(ProcessKey, u64)>,
    /// The process that replaced its program, and when.
    pub(crate) exec: Option<(ProcessKey, u64)>,
    /// A mapping call, with the kernfs id of its cgroup.
    pub(crate) mapped: Option<(u64, MappingNote)>,
}

impl Changes {
    /// Empties it, after every follower has taken the changes in.
    pub(crate) fn clear(&mut self) {
        self.points.clear();
        self.processes.clear();
        (self.moved, self.exec, self.mapped) = (None, None, None);
    }

    /// New points of a cgroup's curve, without the first `seen` points of this input.
    pub(crate) fn points_of(&self, cgroup: u64, seen: usize) -> impl Iterator<Item = Point> + '_ {
        let after = self.points.iter().skip(seen);
        after.filter(move |(id, _)| *id == cgroup).map(|(_, point)| *point)
    }
}
