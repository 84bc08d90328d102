//! A pprof profile: gzip over the messages of profile.proto
//! (<https://github.com/google/pprof/blob/main/proto/profile.proto>).
//!
//! A sample has one value per cause, in the order of [`Cause::ALL`], because causes must not be
//! added up; `pprof -sample_index=map` shows another. The structs below are those messages, with
//! the field numbers of the specification and without the fields that memtrace does not write.

use std::collections::HashMap;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use memtrace_incident::{AllocationPath, Cause, Frame, Incident, Kind};
use prost::Message;

use super::paths::GrowthWindow;
use super::{frames, paths, plain};

/// Frames of one stack that are written, innermost first; the others are dropped.
const MAX_FRAMES: usize = 512;
/// Bytes of address space for each module. Readers want addresses and an incident has only offsets,
/// so module `n` is placed at `n` times this.
const MODULE_SPAN: u64 = 1 << 40;

/// The stacks of an incident in a window. `default` is the cause that a reader shows first. Fails
/// only if the compressor does.
pub fn profile(incident: &Incident, window: &GrowthWindow, default: Cause) -> std::io::Result<Vec<u8>> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(&build(incident, window, default).encode_to_vec())?;
    gzip.finish()
}

fn build(incident: &Incident, window: &GrowthWindow, default: Cause) -> Profile {
    let mut builder = ProfileBuilder::default();
    builder.string("");
    let bytes = builder.string("bytes");
    let sample_type = Cause::ALL.map(|cause| ValueType { r#type: builder.string(cause.name()), unit: bytes }).into();
    let mut profile =
        Profile { sample_type, default_sample_type: builder.string(default.name()), ..Profile::default() };
    for (at, cause) in Cause::ALL.into_iter().enumerate() {
        for (path, weight) in incident.allocation_paths.iter().zip(paths::weights(incident, window, cause)) {
            if weight > 0 {
                profile.sample.push(builder.sample(path, at, weight));
            }
        }
    }
    for (why, weight) in paths::without_stack_by_reason(incident, window) {
        let frame = Frame { symbol: Some(format!("[no stack: {why}]")), ..Frame::default() };
        let location_id = vec![builder.location(&[&frame])];
        let label = vec![builder.label("cause", Cause::Touch.name())];
        profile.sample.push(Sample { location_id, value: values(0, weight), label });
    }
    let period = incident.allocations.as_ref().map_or(0, |allocations| allocations.sample_bytes);
    profile.period = i64::try_from(period).unwrap_or(i64::MAX);
    profile.period_type = Some(ValueType { r#type: builder.string(Cause::Touch.name()), unit: bytes });
    let (from_ns, until_ns) = covered_ns(incident, window);
    profile.duration_nanos = i64::try_from(until_ns.saturating_sub(from_ns)).unwrap_or(i64::MAX);
    // Readers take 0 as unknown.
    profile.time_nanos = paths::wall_ns(incident, from_ns).unwrap_or(0);
    profile.comment = vec![builder.string(&format!("memtrace incident {}", plain::escape(&incident.id)))];
    profile.mapping = builder.mapping;
    profile.location = builder.location;
    profile.function = builder.function;
    profile.string_table = builder.strings;
    profile
}

/// From the first sample of the window to its last, or to the event if that is later; boot clock.
fn covered_ns(incident: &Incident, window: &GrowthWindow) -> (u64, u64) {
    let times = || incident.allocations.iter().flat_map(|allocations| &allocations.samples.boot_ns).copied();
    let first = times().min().unwrap_or(incident.at.boot_ns).max(window.from_ns);
    let last = times().max().unwrap_or(incident.at.boot_ns).min(window.until_ns);
    let last = if incident.kind == Kind::Recording { last } else { last.max(incident.at.boot_ns.min(window.until_ns)) };
    (first, last.max(first))
}

/// The values of a sample: `weight` for the cause at index `at`, 0 for the others.
fn values(at: usize, weight: u64) -> Vec<i64> {
    let weight = i64::try_from(weight).unwrap_or(i64::MAX);
    (0..Cause::ALL.len()).map(|cause| if cause == at { weight } else { 0 }).collect()
}

/// The tables of the profile being written, and the id of each entry; ids count from 1.
///
/// Cap of all: what the paths of the incident need; each of them adds at most [`MAX_FRAMES`].
#[derive(Default)]
struct ProfileBuilder {
    strings: Vec<String>,
    mapping: Vec<Mapping>,
    location: Vec<Location>,
    function: Vec<Function>,
    string_at: HashMap<String, i64>,
    mapping_at: HashMap<(String, Option<String>), u64>,
    location_at: HashMap<Location, u64>,
    function_at: HashMap<Function, u64>,
}

impl ProfileBuilder {
    fn string(&mut self, text: &str) -> i64 {
        if let Some(at) = self.string_at.get(text) {
            return *at;
        }
        let at = i64::try_from(self.strings.len()).unwrap_or(0);
        self.strings.push(text.to_owned());
        self.string_at.insert(text.to_owned(), at);
        at
    }

    fn label(&mut self, key: &str, value: &str) -> Label {
        Label { key: self.string(key), str: self.string(&plain::escape(value)), ..Label::default() }
    }

    fn sample(&mut self, path: &AllocationPath, at: usize, weight: u64) -> Sample {
        let mut location_id = Vec::new();
        let mut lines: Vec<&Frame> = Vec::new();
        for frame in path.frames.iter().take(MAX_FRAMES) {
            lines.push(frame);
            if !frame.inlined {
                location_id.push(self.location(&lines));
                lines.clear();
            }
        }
        if !lines.is_empty() {
            location_id.push(self.location(&lines));
        }
        if let Some(cut) = path.cut {
            let frame = Frame { symbol: Some(format!("[cut: {}]", cut.name())), ..Frame::default() };
            location_id.push(self.location(&[&frame]));
        }
        let pid = Label { key: self.string("pid"), num: i64::from(path.process.pid), ..Label::default() };
        let label = vec![self.label("process", &path.process.comm), pid, self.label("cause", path.cause.name())];
        Sample { location_id, value: values(at, weight), label }
    }

    /// The id of the location of `frames`: a frame with the functions inlined in it, innermost
    /// first.
    fn location(&mut self, frames: &[&Frame]) -> u64 {
        let line = frames.iter().map(|frame| self.line(frame)).collect();
        let mut location = Location { line, ..Location::default() };
        if let Some(frame) = frames.last()
            && let Some(module) = &frame.module
        {
            location.mapping_id = self.mapping(module, frame.build_id.as_deref());
            let offset = frame.offset.unwrap_or(0) % MODULE_SPAN;
            location.address = location.mapping_id.saturating_mul(MODULE_SPAN).saturating_add(offset);
        }
        let known = self.location_at.get(&location).copied();
        known.unwrap_or_else(|| {
            let id = self.location.len() as u64 + 1;
            self.location_at.insert(location.clone(), id);
            self.location.push(Location { id, ..location });
            id
        })
    }

    fn line(&mut self, frame: &Frame) -> Line {
        let whole = plain::escape(&frames::label(frame));
        // pprof removes angle brackets itself, which leaves `::c` of `<A as B>::c`.
        let name =
            frame.symbol.as_deref().map_or_else(|| whole.clone(), |name| plain::escape(&frames::short_name(name)));
        let name = if frame.kernel { format!("{name}_[k]") } else { name };
        let mut function = Function { name: self.string(&name), ..Function::default() };
        function.system_name = self.string(&whole);
        function.filename = self.string(&plain::escape(frame.file.as_deref().unwrap_or_default()));
        let known = self.function_at.get(&function).copied();
        let function_id = known.unwrap_or_else(|| {
            let id = self.function.len() as u64 + 1;
            self.function_at.insert(function.clone(), id);
            self.function.push(Function { id, ..function });
            id
        });
        Line { function_id, line: frame.line.map_or(0, i64::from) }
    }

    fn mapping(&mut self, module: &str, build_id: Option<&str>) -> u64 {
        let key = (module.to_owned(), build_id.map(str::to_owned));
        if let Some(id) = self.mapping_at.get(&key) {
            return *id;
        }
        let id = self.mapping.len() as u64 + 1;
        let memory_start = id.saturating_mul(MODULE_SPAN);
        let mapping = Mapping {
            id,
            memory_start,
            memory_limit: memory_start.saturating_add(MODULE_SPAN),
            file_offset: 0,
            filename: self.string(&plain::escape(module)),
            build_id: self.string(&plain::escape(build_id.unwrap_or_default())),
            // Names are already in the profile, so a reader need not open the files.
            has_functions: true,
            has_filenames: true,
            has_line_numbers: true,
            has_inline_frames: true,
        };
        self.mapping.push(mapping);
        self.mapping_at.insert(key, id);
        id
    }
}

/// `perftools.profiles.Profile`.
#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "3")]
    mapping: Vec<Mapping>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    time_nanos: i64,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
    #[prost(int64, repeated, tag = "13")]
    comment: Vec<i64>,
    #[prost(int64, tag = "14")]
    default_sample_type: i64,
}

/// `perftools.profiles.ValueType`.
#[derive(Clone, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    r#type: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

/// `perftools.profiles.Sample`: a stack, innermost first, and its values.
#[derive(Clone, PartialEq, Message)]
struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    label: Vec<Label>,
}

/// `perftools.profiles.Label`: a key with a string or a number.
#[derive(Clone, PartialEq, Message)]
struct Label {
    #[prost(int64, tag = "1")]
    key: i64,
    #[prost(int64, tag = "2")]
    str: i64,
    #[prost(int64, tag = "3")]
    num: i64,
}

/// `perftools.profiles.Mapping`: a module.
#[derive(Clone, PartialEq, Message)]
struct Mapping {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    memory_start: u64,
    #[prost(uint64, tag = "3")]
    memory_limit: u64,
    #[prost(uint64, tag = "4")]
    file_offset: u64,
    #[prost(int64, tag = "5")]
    filename: i64,
    #[prost(int64, tag = "6")]
    build_id: i64,
    #[prost(bool, tag = "7")]
    has_functions: bool,
    #[prost(bool, tag = "8")]
    has_filenames: bool,
    #[prost(bool, tag = "9")]
    has_line_numbers: bool,
    #[prost(bool, tag = "10")]
    has_inline_frames: bool,
}

/// `perftools.profiles.Location`: an address, and the functions inlined there, innermost first.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    mapping_id: u64,
    #[prost(uint64, tag = "3")]
    address: u64,
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

/// `perftools.profiles.Line`: a function and a line in it.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

/// `perftools.profiles.Function`.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use memtrace_incident::fixtures;

    use super::*;

    fn decoded(bytes: &[u8]) -> Profile {
        let mut raw = Vec::new();
        flate2::read::GzDecoder::new(bytes).read_to_end(&mut raw).unwrap();
        Profile::decode(&*raw).unwrap()
    }

    fn sum(profile: &Profile, cause: Cause) -> u64 {
        let at = Cause::ALL.iter().position(|of| *of == cause).unwrap();
        profile.sample.iter().map(|sample| sample.value[at] as u64).sum()
    }

    #[test]
    fn what_is_read_back_adds_up() {
        let burst = fixtures::burst();
        let allocations = burst.allocations.as_ref().unwrap();
        let read = decoded(&profile(&burst, &GrowthWindow::WHOLE, Cause::Touch).unwrap());
        assert_eq!(sum(&read, Cause::Touch), allocations.growth_bytes);
        for cause in [Cause::Map, Cause::Brk, Cause::Charge] {
            let of = burst.allocation_paths.iter().filter(|path| path.cause == cause);
            assert_eq!(sum(&read, cause), of.map(|path| path.weight_bytes).sum::<u64>());
        }
        let string = |at: i64| read.string_table[usize::try_from(at).unwrap()].as_str();
        assert_eq!(string(0), "");
        assert_eq!(string(read.default_sample_type), "touch");
        assert!(read.mapping.iter().any(|mapping| !string(mapping.build_id).is_empty()));
        assert!(read.location.iter().any(|location| location.line.len() > 1), "no inlined function");
        let named = |name: &str| read.function.iter().find(|function| string(function.name) == name).unwrap();
        assert_eq!(string(named("app::cache::Cache::fill").system_name), "<app::cache::Cache<u8>>::fill");
        // Every id exists.
        let ids = |count: usize| 1..=count as u64;
        for sample in &read.sample {
            assert!(sample.location_id.iter().all(|id| ids(read.location.len()).contains(id)));
        }
        for location in &read.location {
            assert!(location.mapping_id <= read.mapping.len() as u64);
            assert!(location.line.iter().all(|line| ids(read.function.len()).contains(&line.function_id)));
        }
        // The profile ends at the kill.
        let wall: jiff::Timestamp = burst.at.wall.parse().unwrap();
        assert_eq!(i128::from(read.time_nanos + read.duration_nanos), wall.as_nanosecond());
    }

    #[test]
    fn a_window_has_what_was_in_it() {
        let burst = fixtures::burst();
        let window = GrowthWindow::before(&burst, 1_000_000_000);
        let read = decoded(&profile(&burst, &window, Cause::Map).unwrap());
        let wanted = paths::weights(&burst, &window, Cause::Touch).iter().sum::<u64>();
        assert_eq!(sum(&read, Cause::Touch), wanted + paths::without_stack(&burst, &window));
        assert!(read.duration_nanos <= 1_000_000_000);
    }
}
