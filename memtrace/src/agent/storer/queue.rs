//! Incidents that wait to be written, and what they may take.

use std::collections::VecDeque;
use std::io;

use memtrace_incident::{Incident, Kind, codec};

use crate::store::retention;
use crate::symbolize::frame_names::{ModuleName, UnnamedFrames};

/// Incidents that wait. A storm of kills closes hundreds at once.
pub(super) const MAX_WAITING: usize = 1024;
/// What they may take, bytes, as [`bytes_of`] estimates. One is always kept.
pub(super) const MAX_WAITING_BYTES: usize = 32 << 20;
/// Modules of one incident whose files are asked for.
pub(super) const MAX_MODULES: usize = 1024;

/// An incident as the bytes of its file, and what is still to be known of it when it is written.
#[derive(Debug, PartialEq)]
pub(super) struct PackedIncident {
    pub(super) id: String,
    /// Syncs of the ledger that come first.
    after: u64,
    pub(super) kind: Kind,
    /// What retention knows it by.
    pub(super) cgroup: String,
    /// Modules that have its unnamed frames. Cap: [`MAX_MODULES`].
    pub(super) modules: Vec<ModuleName>,
    pub(super) file: Box<[u8]>,
}

impl PackedIncident {
    pub(super) fn of(incident: &Incident, after: u64) -> io::Result<Self> {
        let unnamed = UnnamedFrames::of(incident).0.into_iter();
        Ok(Self {
            id: incident.id.clone(),
            after,
            kind: incident.kind,
            cgroup: retention::name(&incident.cgroup),
            modules: unnamed.map(|(module, _)| module).take(MAX_MODULES).collect(),
            // Without the room that it grew into.
            file: codec::encode(incident)?.into_boxed_slice(),
        })
    }

    /// What it takes, bytes.
    fn bytes(&self) -> usize {
        const REST: usize = 500;
        let of_module = |(path, build_id): &ModuleName| {
            path.capacity() + build_id.as_ref().map_or(0, String::capacity) + size_of::<ModuleName>()
        };
        let modules = self.modules.iter().map(of_module).sum::<usize>();
        self.file.len() + self.cgroup.len() + modules + REST
    }
}

/// An incident that is not written.
pub(super) enum GivenUp {
    Whole(Box<Incident>),
    Packed(PackedIncident),
}

impl GivenUp {
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Whole(incident) => &incident.id,
            Self::Packed(packed) => &packed.id,
        }
    }
}

/// Incidents that wait, [`MAX_WAITING`] of them with [`MAX_WAITING_BYTES`].
#[derive(Debug, Default, PartialEq)]
pub(super) struct Waiting {
    /// As the recorder hands them over, oldest first, and the syncs of the ledger that come first.
    whole: VecDeque<(Box<Incident>, u64)>,
    whole_bytes: usize,
    /// Older ones, ready to be written.
    packed: VecDeque<PackedIncident>,
    /// Those that could not be written: others go first, because what is wrong may be wrong with one only.
    failed: VecDeque<PackedIncident>,
    /// What `packed` and `failed` take.
    packed_bytes: usize,
}

impl Waiting {
    pub(super) fn len(&self) -> usize {
        self.whole.len() + self.packed.len() + self.failed.len()
    }

    /// Whether one can be written.
    pub(super) fn has_packed(&self) -> bool {
        !self.packed.is_empty() || !self.failed.is_empty()
    }

    /// Whether the one that [`Waiting::take_packed`] would give may be written after so many syncs of the ledger.
    pub(super) fn has_packed_after(&self, syncs: u64, or_failed: bool) -> bool {
        let next = self.packed.front().or_else(|| self.failed.front().filter(|_| or_failed));
        next.is_some_and(|next| next.after <= syncs)
    }

    /// Whether one is still to be packed.
    #[cfg(test)]
    pub(super) fn has_whole(&self) -> bool {
        !self.whole.is_empty()
    }

    /// Whether one was not tried yet.
    pub(super) fn has_untried(&self) -> bool {
        !self.whole.is_empty() || !self.packed.is_empty()
    }

    /// Of all that wait, oldest first but for those that failed.
    pub(super) fn ids(&self) -> impl Iterator<Item = &String> {
        let packed = self.failed.iter().chain(&self.packed).map(|packed| &packed.id);
        packed.chain(self.whole.iter().map(|(incident, _)| &incident.id))
    }

    /// Takes one more, which is written after so many syncs of the ledger. Returns those that are given up for it.
    pub(super) fn put(&mut self, incident: Box<Incident>, after: u64) -> Vec<GivenUp> {
        let (bytes, mut given_up) = (bytes_of(&incident), Vec::new());
        while self.len() >= MAX_WAITING
            || self.whole_bytes.saturating_add(self.packed_bytes).saturating_add(bytes) > MAX_WAITING_BYTES
        {
            let Some(one) = self.give_up_one() else { break };
            given_up.push(one);
        }
        self.whole_bytes = self.whole_bytes.saturating_add(bytes);
        self.whole.push_back((incident, after));
        given_up
    }

    /// The oldest, but of those that are not packed while they take most of the room: ten packed ones would go for one.
    fn give_up_one(&mut self) -> Option<GivenUp> {
        if self.whole_bytes > MAX_WAITING_BYTES / 2 || !self.has_packed() {
            return self.take_whole().map(|(incident, _)| GivenUp::Whole(incident));
        }
        self.take_failed().or_else(|| self.take_packed(false)).map(GivenUp::Packed)
    }

    pub(super) fn take_whole(&mut self) -> Option<(Box<Incident>, u64)> {
        let (incident, after) = self.whole.pop_front()?;
        self.whole_bytes = self.whole_bytes.saturating_sub(bytes_of(&incident));
        Some((incident, after))
    }

    pub(super) fn put_packed(&mut self, incident: PackedIncident) {
        self.packed_bytes = self.packed_bytes.saturating_add(incident.bytes());
        self.packed.push_back(incident);
    }

    /// One that could not be written.
    pub(super) fn put_failed(&mut self, incident: PackedIncident) {
        self.packed_bytes = self.packed_bytes.saturating_add(incident.bytes());
        self.failed.push_back(incident);
    }

    /// One to be written, of those that failed only when it may be and there is no other.
    pub(super) fn take_packed(&mut self, or_failed: bool) -> Option<PackedIncident> {
        match self.packed.pop_front() {
            Some(incident) => {
                self.packed_bytes = self.packed_bytes.saturating_sub(incident.bytes());
                Some(incident)
            }
            None if or_failed => self.take_failed(),
            None => None,
        }
    }

    fn take_failed(&mut self) -> Option<PackedIncident> {
        let incident = self.failed.pop_front()?;
        self.packed_bytes = self.packed_bytes.saturating_sub(incident.bytes());
        Some(incident)
    }

    /// Has those that failed tried once more, after all others.
    pub(super) fn retry_failed(&mut self) {
        self.packed.append(&mut self.failed);
    }
}

/// What an incident takes, bytes: an estimate by what there can be much of.
pub(super) fn bytes_of(incident: &Incident) -> usize {
    const POINT: usize = 160;
    const FRAME: usize = 160;
    const ROW: usize = 400;
    let frames = incident.allocation_paths.iter().map(|path| path.frames.len()).sum::<usize>();
    let rows = incident.allocation_paths.len() + incident.growth.len() + incident.mappings.len();
    incident.timeline.columns.boot_ns.len() * POINT + frames * FRAME + rows * ROW + ROW
}
