//! Converts boot-clock times to wall time and to incident ids. An anchor, which is both clocks read
//! together, connects them. The engine reads no clock itself.

use jiff::Timestamp;
use memtrace_incident::At;
use ulid::Ulid;

/// Boot clock and wall clock, as last read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Anchor {
    pub(crate) boot_ns: u64,
    pub(crate) wall_ns: i64,
    pub(crate) uncertainty_ns: u64,
}

/// What the id of an incident is derived from.
pub(crate) struct Identity<'a> {
    pub(crate) kind: &'a str,
    pub(crate) boot_id: &'a str,
    pub(crate) boot_ns: u64,
    pub(crate) pid: u32,
    pub(crate) start_boot_ns: u64,
}

/// The latest anchor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    pub(crate) anchor: Option<Anchor>,
}

impl Clock {
    /// Without an anchor the boot clock is taken as time since 1970, and the uncertainty is
    /// maximal.
    fn wall_ns(&self, boot_ns: u64) -> i128 {
        self.anchor.map_or(i128::from(boot_ns), |a| i128::from(a.wall_ns) + i128::from(boot_ns) - i128::from(a.boot_ns))
    }

    pub(crate) fn wall(&self, boot_ns: u64) -> String {
        let moment = Timestamp::from_nanosecond(self.wall_ns(boot_ns)).unwrap_or(Timestamp::MAX);
        format!("{moment:.9}")
    }

    pub(crate) fn at(&self, boot_ns: u64) -> At {
        let wall_uncertainty_ns = self.anchor.map_or(u64::MAX, |a| a.uncertainty_ns);
        At { boot_ns, wall: self.wall(boot_ns), wall_uncertainty_ns }
    }

    /// A ULID of the event's wall time and a hash of its identity, so that a replay gives the same
    /// id.
    pub(crate) fn incident_id(&self, identity: &Identity<'_>) -> String {
        const MILLIS_MAX: i128 = (1 << 48) - 1;
        let millis = (self.wall_ns(identity.boot_ns) / 1_000_000).clamp(0, MILLIS_MAX);
        let mut hash = Fnv::default();
        hash.write(identity.boot_id.as_bytes());
        hash.write(&[0]);
        hash.write(identity.kind.as_bytes());
        hash.write(&identity.boot_ns.to_le_bytes());
        hash.write(&identity.pid.to_le_bytes());
        hash.write(&identity.start_boot_ns.to_le_bytes());
        Ulid::from_parts(u64::try_from(millis).unwrap_or(0), hash.0).to_string()
    }
}

/// FNV-1a with 128 bits. Its result must never change, because ids depend on it.
struct Fnv(u128);

impl Default for Fnv {
    fn default() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u128::from(*b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(clock: &Clock, pid: u32) -> String {
        clock.incident_id(&Identity { kind: "oom_kill", boot_id: "b", boot_ns: 5_000_000_000, pid, start_boot_ns: 1 })
    }

    #[test]
    fn wall_time_comes_from_the_anchor() {
        let anchor = Anchor { boot_ns: 1_000_000_000, wall_ns: 1_700_000_000_123_456_789, uncertainty_ns: 42 };
        let clock = Clock { anchor: Some(anchor) };
        let at = clock.at(2_000_000_001);
        assert_eq!((at.wall.as_str(), at.wall_uncertainty_ns), ("2023-11-14T22:13:21.123456790Z", 42));
        assert_eq!(clock.at(0).wall, "2023-11-14T22:13:19.123456789Z");
        assert_eq!(Clock::default().at(7).wall_uncertainty_ns, u64::MAX);
        let _ = clock.at(u64::MAX);
    }

    #[test]
    fn ids_are_stable_distinct_and_carry_the_time() {
        let clock =
            Clock { anchor: Some(Anchor { boot_ns: 0, wall_ns: 1_700_000_000_000_000_000, uncertainty_ns: 0 }) };
        assert_eq!(id(&clock, 7), id(&clock, 7));
        assert_ne!(id(&clock, 7), id(&clock, 8));
        let parsed = Ulid::from_string(&id(&clock, 7)).unwrap();
        assert_eq!(parsed.timestamp_ms(), 1_700_000_005_000);
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        let mut hash = Fnv::default();
        hash.write(b"a");
        assert_eq!(hash.0, 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }
}
