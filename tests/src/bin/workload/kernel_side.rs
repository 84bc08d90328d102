//! Memory that the kernel holds for a process: socket buffers and page cache.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::Context;
use serde_json::json;

use crate::memory;

const MIB: usize = 1 << 20;

/// Fills socket buffers with `mib` that nobody reads, then waits for the end of stdin.
pub(crate) fn sockets(mib: usize) -> anyhow::Result<()> {
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(4096), maximum: Some(4096) },
    )
    .context("failed to raise the limit of open files")?;
    let (pairs, sent) = filled_sockets(mib)?;
    crate::say("ready", &json!({ "sockets": pairs.len() * 2, "sent_bytes": sent }))?;
    crate::wait_for_end_of_stdin()?;
    drop(pairs);
    Ok(())
}

/// Socket pairs with `mib` in their buffers, and the number of bytes sent.
pub(crate) fn filled_sockets(mib: usize) -> anyhow::Result<(Vec<(UnixStream, UnixStream)>, usize)> {
    let chunk = [1u8; 4096];
    let mut pairs = Vec::new();
    let mut sent = 0;
    while sent < mib * MIB {
        let (mut writer, reader) = UnixStream::pair().context("failed to make a pair of sockets")?;
        writer.set_nonblocking(true).context("failed to make a socket non-blocking")?;
        loop {
            match writer.write(&chunk) {
                Ok(written) => sent += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("failed to write to a socket"),
            }
        }
        pairs.push((writer, reader));
    }
    Ok((pairs, sent))
}

/// Reads the first `mib` of a file `rounds` times through the page cache, then touches `then_anon_mib` of its own.
pub(crate) fn cache(path: &Path, mib: usize, rounds: usize, then_anon_mib: usize) -> anyhow::Result<()> {
    let mut file = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
    let mut chunk = vec![0u8; 64 << 10];
    let mut read = 0;
    for _ in 0..rounds {
        file.seek(SeekFrom::Start(0)).with_context(|| format!("failed to rewind {}", path.display()))?;
        for _ in 0..mib * MIB / chunk.len() {
            let count = file.read(&mut chunk).with_context(|| format!("failed to read {}", path.display()))?;
            read += count;
            if count == 0 {
                break;
            }
        }
    }
    crate::say("cached", &json!({ "read_bytes": read }))?;
    let held = memory::touched(then_anon_mib);
    crate::say("ready", &json!({ "anon_mib": then_anon_mib }))?;
    crate::wait_for_end_of_stdin()?;
    drop(held);
    Ok(())
}
