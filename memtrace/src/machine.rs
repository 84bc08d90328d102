//! What machine this is, and what this process takes from it.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::debug;

use crate::clock;
use memtrace_incident::Host;

/// The limit of locked memory as it was; dropping this gives it back.
#[derive(Debug)]
#[must_use = "the limit is given back when this is dropped"]
pub struct Memlock {
    before: Rlimit,
}

/// Lifts the limit of locked memory: 5.10 accounts BPF maps and programs to it when they are made. Later kernels do
/// not, so a refusal only matters there. `None` when there was nothing to lift, or it could not be.
pub fn raise_memlock() -> Option<Memlock> {
    let before = getrlimit(Resource::Memlock);
    before.current?;
    match setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }) {
        Ok(()) => Some(Memlock { before }),
        Err(error) => {
            debug!("RLIMIT_MEMLOCK stays as it is: {error}");
            None
        }
    }
}

impl Drop for Memlock {
    fn drop(&mut self) {
        // Lowering is always allowed.
        if let Err(error) = setrlimit(Resource::Memlock, self.before) {
            debug!("RLIMIT_MEMLOCK stays lifted: {error}");
        }
    }
}

/// Hides kernel addresses in address-space identities; only has to differ between runs.
pub fn salt() -> u64 {
    let mut bytes = [0u8; 8];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(8) => u64::from_ne_bytes(bytes),
        _ => clock::boot_ns().wrapping_mul(0x9e37_79b9_7f4a_7c15),
    }
}

/// CPUs that can ever come online, which is how many slots a per-CPU counter has.
pub fn possible_cpus() -> u32 {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let last = text.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<u32>().ok());
    last.map_or(1, |last| last.saturating_add(1))
}

/// The machine as an incident names it.
pub fn host() -> Host {
    let uname = rustix::system::uname();
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let page_bytes = rustix::param::page_size() as u64;
    let total_kib = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Host {
        hostname: uname.nodename().to_string_lossy().into_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
        boot_id: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
        cpus: std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
        memory_bytes: total_kib.unwrap_or(0).saturating_mul(1024),
        page_bytes,
        // MEMCG_CHARGE_BATCH: 64 pages since 5.15, 32 before; the larger bound holds for both.
        charge_batch_bytes: page_bytes.saturating_mul(64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_locked_memory_comes_back() {
        let found = getrlimit(Resource::Memlock);
        // Raising needs a privilege that not even every root has; giving back never does.
        drop(raise_memlock());
        assert_eq!(getrlimit(Resource::Memlock), found);
        drop(Memlock { before: Rlimit { current: Some(4096), maximum: found.maximum } });
        assert_eq!(getrlimit(Resource::Memlock).current, Some(4096));
        drop(Memlock { before: found });
        assert_eq!(getrlimit(Resource::Memlock), found);
    }
}
