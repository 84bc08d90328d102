//! Keeps a secret all over the stack while memory is touched: in the frames above the one that
//! touches, and in what earlier calls left below it.

use std::fmt::Write;
use std::hint::black_box;
use std::time::Duration;

use anyhow::Context;
use memmap2::MmapMut;
use serde_json::json;

const SECRET_BYTES: usize = 32;
/// Copies on each side: 16 KiB.
const COPIES: usize = 512;
const STEP_BYTES: usize = 256 << 10;
const STEP_TIME: Duration = Duration::from_millis(5);

/// Prints the secret, then takes `mib` of memory in small steps with the secret around it on the
/// stack.
pub(crate) fn keep(mib: usize) -> anyhow::Result<()> {
    let mut secret = [0u8; SECRET_BYTES];
    rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty()).context("failed to make a secret")?;
    let mut hex = String::new();
    for byte in secret {
        write!(hex, "{byte:02x}").context("failed to write the secret")?;
    }
    crate::say("secret", &json!({ "hex": hex }))?;
    let held = with_the_secret_above(&secret, mib)?;
    crate::say("ready", &json!({ "anon_mib": mib }))?;
    drop(held);
    Ok(())
}

/// Fills its frame with the secret while it touches all of the memory.
#[inline(never)]
fn with_the_secret_above(secret: &[u8; SECRET_BYTES], mib: usize) -> anyhow::Result<Vec<MmapMut>> {
    let mut above = [*secret; COPIES];
    black_box(&mut above);
    let mut held = Vec::new();
    for _ in 0..(mib << 20) / STEP_BYTES {
        leave_the_secret_below(secret);
        held.push(touch_with_the_secret_around()?);
        std::thread::sleep(STEP_TIME);
    }
    black_box(&mut above);
    Ok(held)
}

/// Leaves 16 KiB of the secret where the next frames will be.
#[inline(never)]
fn leave_the_secret_below(secret: &[u8; SECRET_BYTES]) {
    let mut below = [*secret; COPIES];
    black_box(&mut below);
}

#[inline(never)]
fn touch_with_the_secret_around() -> anyhow::Result<MmapMut> {
    let mut memory = MmapMut::map_anon(STEP_BYTES).context("failed to map anonymous memory")?;
    crate::memory::touch(&mut memory);
    Ok(memory)
}
