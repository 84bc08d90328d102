//! Any bytes as what the process that names functions is asked and answers. With any names an incident can be written,
//! read back and reported.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memtrace::symbolize::frame_names::{FrameNames, NamingSummary, OffsetNames};
use memtrace::symbolize::job::NamingJob;
use memtrace_incident::{codec, fixtures};
use memtrace_report::{Style, text};

fuzz_target!(|bytes: &[u8]| {
    let _ = serde_json::from_slice::<NamingJob>(bytes);
    let mut incident = fixtures::hostile();
    for frame in incident.allocation_paths.iter_mut().flat_map(|path| &mut path.frames) {
        frame.symbol = None;
    }
    let names = if let Ok(names) = serde_json::from_slice::<FrameNames>(bytes) {
        names
    } else if let Ok(names) = serde_json::from_slice::<Vec<OffsetNames>>(bytes) {
        // The same names for every module that is there.
        let frames = incident.allocation_paths.iter().flat_map(|path| &path.frames);
        let modules = frames.filter_map(|frame| Some((frame.module.clone()?, frame.build_id.clone())));
        FrameNames(modules.map(|module| (module, names.clone())).collect())
    } else {
        return;
    };
    let NamingSummary { asked, named } = names.apply(&mut incident);
    assert!(named <= asked);
    // One that is too large for its format is refused when it is read, and nothing worse.
    let Ok(file) = codec::encode(&incident) else { return };
    let _ = codec::decode(&file);
    assert!(text::report(&incident, &Style::PLAIN).ends_with('\n'));
});
