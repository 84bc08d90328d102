//! Any bytes as what a stack worker or the recorder sends: as they are, and as frames of the right length. What comes
//! of the messages is numbered anew and taken by an engine.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use memtrace::stacks::messages::{FromWorker, Incoming, ToWorker};
use memtrace::stacks::renumbering::Renumbering;
use memtrace_engine::input::{Fact, Input, StackFound};
use memtrace_engine::{Engine, Out};

/// More would not fit into the socket, and a write would wait.
const MOST_BYTES: usize = 64 << 10;

/// What the other side reads of these bytes.
fn sent(bytes: &[u8]) -> Option<Incoming> {
    let (mut ours, theirs) = UnixStream::pair().ok()?;
    ours.write_all(bytes).ok()?;
    drop(ours);
    let mut incoming = Incoming::default();
    while incoming.read(&theirs).is_ok() {}
    Some(incoming)
}

fn take(bytes: &[u8]) {
    if let Some(mut incoming) = sent(bytes) {
        while let Ok(Some(_)) = incoming.next_message::<ToWorker>() {}
    }
    let Some(mut incoming) = sent(bytes) else { return };
    let (mut numbers, mut engine, mut out) = (Renumbering::default(), Engine::new(), Out::default());
    while let Ok(Some(message)) = incoming.next_message::<FromWorker>() {
        let FromWorker::Batch(batch) = message else { continue };
        let stacks = batch.stacks.into_iter().map(StackFound::from).map(Fact::Stack);
        for fact in numbers.renumber(batch.facts.into_iter().chain(stacks)) {
            engine.apply(&Input::Fact(fact), &mut out);
        }
        numbers.forget_unused();
    }
    engine.apply(&Input::Fact(Fact::Stop { boot_ns: 1 << 60 }), &mut out);
}

fuzz_target!(|bytes: &[u8]| {
    let bytes = bytes.get(..MOST_BYTES).unwrap_or(bytes);
    take(bytes);
    let mut framed = Vec::new();
    for message in bytes.split(|byte| *byte == b'\n') {
        framed.extend(u32::try_from(message.len()).unwrap_or_default().to_le_bytes());
        framed.extend(message);
    }
    if framed.len() <= MOST_BYTES {
        take(&framed);
    }
});
