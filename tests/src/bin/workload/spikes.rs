//! Spikes of memory over a base level. The workload records when each was and how high.

use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use memmap2::MmapOptions;
use memtrace_tests::cage;
use memtrace_tests::process::boot_ns;
use serde_json::json;

use crate::memory;

/// One spike: `MIB:HOLD_MS:PAUSE_MS`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpikeShape {
    mib: usize,
    /// Time at the top.
    hold: Duration,
    /// Time before the spike.
    pause: Duration,
}

impl FromStr for SpikeShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is not MIB:HOLD_MS:PAUSE_MS");
        let numbers: Vec<u64> = text.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| wrong())?;
        let [mib, hold, pause] = numbers.as_slice() else { return Err(wrong()) };
        let mib = usize::try_from(*mib).map_err(|_| wrong())?;
        Ok(Self { mib, hold: Duration::from_millis(*hold), pause: Duration::from_millis(*pause) })
    }
}

/// Makes the spikes in sequence. Waits for the end of stdin before the first and after the last
/// pause.
pub(crate) fn run(base_mib: usize, spikes: &[SpikeShape]) -> anyhow::Result<()> {
    let base = memory::touched(base_mib);
    let place = cage::own_place()?;
    crate::say("ready", &json!({ "path": place.path, "usage_file": place.usage_file() }))?;
    crate::wait_for_end_of_stdin()?;
    for spike in spikes {
        std::thread::sleep(spike.pause);
        let base_resident_bytes = resident()?;
        let base_bytes = place.usage()?;
        let start_ns = boot_ns();
        let mut mapped =
            MmapOptions::new().len(spike.mib << 20).map_anon().context("failed to map anonymous memory")?;
        memory::touch(&mut mapped);
        let top_ns = boot_ns();
        let top_bytes = place.usage()?;
        std::thread::sleep(spike.hold.saturating_sub(Duration::from_nanos(boot_ns().saturating_sub(top_ns))));
        let fall_ns = boot_ns();
        drop(mapped);
        let end_ns = boot_ns();
        let told = json!({
            "mib": spike.mib, "hold_ms": spike.hold.as_millis(), "start_ns": start_ns, "top_ns": top_ns,
            "fall_ns": fall_ns, "end_ns": end_ns, "base_bytes": base_bytes, "top_bytes": top_bytes,
            "base_resident_bytes": base_resident_bytes,
        });
        crate::say("spike", &told)?;
    }
    drop(base);
    Ok(())
}

/// Resident memory from smaps_rollup: exact, but too slow to be read at the top of a spike.
fn resident() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").context("failed to read /proc/self/smaps_rollup")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kib = line.and_then(|rest| rest.split_ascii_whitespace().next()).context("smaps_rollup has no Rss")?;
    Ok(kib.parse::<u64>().context("Rss is not a number")? * 1024)
}
