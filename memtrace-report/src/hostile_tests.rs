//! No incident file makes a format that shows allocation paths panic or print control characters.

use memtrace_incident::*;
use proptest::prelude::*;

use super::paths::GrowthWindow;
use super::{Style, firefox, folded, plain, pprof, text};

/// Writes every format, for every cause, with and without a window.
fn write_every_format(incident: &Incident) {
    for unicode in [false, true] {
        let shown = text::report(incident, &Style { colour: false, width: 80, unicode });
        assert!(shown.chars().all(|character| character == '\n' || !plain::is_dangerous(character)), "{shown:?}");
    }
    for window in [GrowthWindow::WHOLE, GrowthWindow::before(incident, 1_000_000_000)] {
        for cause in Cause::ALL {
            let lines = folded::stacks(incident, &window, cause);
            assert!(
                lines.lines().all(|line| line.rsplit_once(' ').is_some_and(|(_, bytes)| bytes.parse::<u64>().is_ok()))
            );
            pprof::profile(incident, &window, cause).unwrap();
        }
    }
    let json = firefox::profile(incident).unwrap();
    serde_json::from_str::<serde_json::Value>(&json).unwrap();
}

fn text() -> impl Strategy<Value = Option<String>> {
    prop_oneof![
        Just(None),
        Just(Some(String::new())),
        ".{0,12}".prop_map(Some),
        "[<>:;{}a# /\n\u{1b}]{0,24}".prop_map(Some),
        prop::sample::select(&["{closure#0}", "f<a::g::{closure_env#0}>", "alloc::vec::Vec<T>::push", "malloc"][..])
            .prop_map(|name| Some(name.to_owned())),
        prop::sample::select(&["/lib/libc.so.6", "/app", "/rustc/1/library/alloc/src/vec/mod.rs"][..])
            .prop_map(|name| Some(name.to_owned())),
    ]
}

prop_compose! {
    fn frame()(
        module in text(), build_id in text(), offset in any::<Option<u64>>(), symbol in text(), file in text(),
        line in any::<Option<u32>>(), inlined in any::<bool>(), kernel in any::<bool>(),
    ) -> Frame {
        Frame { module, build_id, offset, symbol, file, line, inlined, kernel }
    }
}

prop_compose! {
    fn path()(
        weight_bytes in any::<u64>(), cause in prop::sample::select(&Cause::ALL[..]), comm in text(), pid in 0u32..4,
        frames in prop::collection::vec(frame(), 0..9), mapped_by in prop::option::of(0u32..8),
        cut in prop::option::of(prop::sample::select(&[Cut::Slice, Cut::Gone, Cut::Frames][..])),
    ) -> AllocationPath {
        let process = Process { pid, tid: pid, start_boot_ns: 0, comm: comm.unwrap_or_default() };
        AllocationPath { weight_bytes, cause, process, frames, cut, mapped_by }
    }
}

prop_compose! {
    fn allocations()(
        growth_bytes in any::<u64>(), attributed_bytes in any::<u64>(), thinned in any::<u64>(), joined in any::<u64>(),
        sample_bytes in any::<u64>(), unattributed in prop::collection::vec((text(), any::<u64>()), 0..6),
        boot_ns in prop::collection::vec(any::<u64>(), 0..20),
        path in prop::collection::vec(prop::option::of(0u32..8), 0..20),
        weight_bytes in prop::collection::vec(prop_oneof![0u64..1 << 24, any::<u64>()], 0..20),
    ) -> Allocations {
        let reason = |(why, bytes): (Option<String>, u64)| Unattributed { why: why.unwrap_or_default(), bytes };
        Allocations {
            growth_bytes, attributed_bytes, thinned, joined, sample_bytes,
            unattributed: unattributed.into_iter().map(reason).collect(),
            samples: AllocationSamples { boot_ns, path, weight_bytes },
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_format_panics(
        paths in prop::collection::vec(path(), 0..7),
        allocations in prop::option::of(allocations()),
        at in any::<u64>(),
        wall in text(),
        recording in any::<bool>(),
    ) {
        let mut incident = if recording { fixtures::recording() } else { fixtures::burst() };
        incident.allocation_paths = paths;
        incident.allocations = allocations;
        incident.at.boot_ns = at;
        incident.at.wall = wall.unwrap_or_default();
        write_every_format(&incident);
    }
}

#[test]
fn a_file_at_its_caps_is_shown_in_a_few_lines() {
    let mut incident = fixtures::burst();
    let deep = |number: u64| AllocationPath {
        frames: (0..200)
            .map(|depth| Frame {
                module: Some("/app".into()),
                offset: Some(number << 16 | depth),
                symbol: (depth % 3 > 0).then(|| format!("app::f{}::<alloc::vec::Vec<u8>>", (number + depth) % 900)),
                inlined: depth % 2 == 0,
                ..Frame::default()
            })
            .collect(),
        ..incident.allocation_paths[0].clone()
    };
    incident.allocation_paths = (0..2048).map(deep).collect();
    let samples = &mut incident.allocations.as_mut().unwrap().samples;
    samples.boot_ns = (0..20_000).map(|step| incident.at.boot_ns - step).collect();
    samples.path = (0..20_000).map(|step| Some(step % 2100)).collect();
    samples.weight_bytes = vec![1 << 20; 20_000];
    let shown = text::report(&incident, &Style::PLAIN);
    assert!(shown.lines().count() < 80, "{shown}");
    assert!(folded::stacks(&incident, &GrowthWindow::WHOLE, Cause::Touch).lines().count() <= 2048 + 3);
    pprof::profile(&incident, &GrowthWindow::WHOLE, Cause::Touch).unwrap();
    firefox::profile(&incident).unwrap();
}

#[test]
fn an_incident_without_allocations_is_shown() {
    let mut incident = fixtures::burst();
    for allocations in [None, Some(Allocations::default())] {
        incident.allocations = allocations;
        write_every_format(&incident);
        incident.allocation_paths.clear();
        incident.timeline = Timeline::default();
        write_every_format(&incident);
        assert_eq!(folded::stacks(&incident, &GrowthWindow::WHOLE, Cause::Touch), "");
    }
}

#[test]
fn a_long_string_is_cut_to_fit_wherever_it_is_shown() {
    fn lengthen(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::String(text) if text.len() < 100 => *text = format!("{text}{}", "x".repeat(100_000)),
            serde_json::Value::Array(entries) => entries.iter_mut().for_each(lengthen),
            serde_json::Value::Object(fields) => fields.values_mut().for_each(lengthen),
            _ => {}
        }
    }
    for incident in [fixtures::burst(), fixtures::group(), fixtures::near_miss(), fixtures::recording()] {
        let mut value = serde_json::to_value(&incident).unwrap();
        for (name, field) in value.as_object_mut().unwrap() {
            // Strings of these are names of an enum, which are not free.
            match name.as_str() {
                "kind" => {}
                "pressure" | "oom" | "allocation_paths" => {
                    let kept = field.clone();
                    lengthen(field);
                    restore(field, &kept);
                }
                _ => lengthen(field),
            }
        }
        let long: Incident = serde_json::from_value(value).unwrap();
        let shown = text::report(&long, &Style::PLAIN);
        assert!(shown.lines().all(|line| line.chars().count() < 1000), "{shown}");
        assert!(shown.lines().count() < 150, "{shown}");
    }
}

/// Gives `value` the enums of `kept` again.
fn restore(value: &mut serde_json::Value, kept: &serde_json::Value) {
    match (value, kept) {
        (serde_json::Value::Array(entries), serde_json::Value::Array(kept)) => {
            entries.iter_mut().zip(kept).for_each(|(entry, kept)| restore(entry, kept));
        }
        (serde_json::Value::Object(fields), serde_json::Value::Object(kept)) => {
            for (name, field) in fields {
                match name.as_str() {
                    "scope" | "limit" | "cause" | "cut" => field.clone_from(&kept[name]),
                    _ => restore(field, &kept[name]),
                }
            }
        }
        _ => {}
    }
}
