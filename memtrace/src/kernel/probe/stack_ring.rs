//! The STACKS ring, drained in another process than the one that loaded the programs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use aya::maps::{Map, MapData, RingBuf};

/// The STACKS ring by its descriptor. Where one process has stopped to read, the next goes on: the
/// position is in the ring's own memory.
pub struct StackRing(RingBuf<MapData>);

impl StackRing {
    /// The ring that this descriptor is of.
    pub fn open(fd: OwnedFd) -> Result<Self, String> {
        let data = MapData::from_fd(fd).map_err(|error| super::chain(&error))?;
        RingBuf::try_from(Map::RingBuf(data)).map(Self).map_err(|error| super::chain(&error))
    }

    /// Lends records to `take`, at most `most` of them and as long as it says so, in the ring's own
    /// memory: they hold stacks of other programs, secrets included, which must not be copied.
    /// Returns whether more may wait.
    pub fn drain(&mut self, most: usize, mut take: impl FnMut(&[u8]) -> bool) -> bool {
        for _ in 0..most {
            let Some(item) = self.0.next() else { return false };
            if !take(&item) {
                break;
            }
        }
        true
    }
}

impl AsFd for StackRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
