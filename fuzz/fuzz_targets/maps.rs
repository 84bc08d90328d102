//! Any bytes as /proc/PID/maps and as a perf map. Mappings are in order and do not overlap, and a
//! lookup returns the mapping that holds the address.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memtrace_unwind::maps::Maps;
use memtrace_unwind::perf_map::PerfMap;

fuzz_target!(|bytes: &[u8]| {
    let maps = Maps::parse(bytes);
    for pair in maps.all().windows(2) {
        assert!(pair[0].start < pair[0].end && pair[0].end <= pair[1].start);
    }
    for mapping in maps.all() {
        assert_eq!(maps.find(mapping.start).map(|(_, found)| found), Some(mapping));
        assert_eq!(maps.find(mapping.end - 1).map(|(_, found)| found), Some(mapping));
    }
    let map = PerfMap::parse(bytes);
    for address in bytes.chunks_exact(8).filter_map(|chunk| chunk.first_chunk()).map(|word| u64::from_le_bytes(*word)) {
        map.find(address);
    }
});
