//! Formats numbers for people: binary sizes, signed changes, durations, percentages and counts. The
//! engine's verdicts and every report use these functions, so the same figure looks the same.

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// A size to about three digits, without trailing zeros: `512 B`, `1.5 KiB`, `450 MiB`, `31.3 GiB`.
pub fn bytes(size: u64) -> String {
    let size = u128::from(size);
    let mut scale = 1u128;
    for (index, unit) in UNITS.iter().enumerate() {
        let last = index + 1 == UNITS.len();
        let places: u32 = match (index, size / scale) {
            (0, _) => 0,
            (_, 0..10) => 2,
            _ => 1,
        };
        let ten = 10u128.pow(places);
        let rounded = (size * ten + scale / 2) / scale;
        // 1023.96 KiB is 1 MiB, not 1024 KiB.
        if rounded < 1024 * ten || last {
            return format!("{} {unit}", decimal(rounded, places));
        }
        scale *= 1024;
    }
    String::new()
}

/// A change in bytes: `+320 MiB`, `-12 KiB`, `0 B`.
pub fn growth(change: i64) -> String {
    let sign = match change {
        0 => "",
        1.. => "+",
        _ => "-",
    };
    format!("{sign}{}", bytes(change.unsigned_abs()))
}

/// A size in bytes, or `unknown` for `None`.
pub fn known(size: Option<u64>) -> String {
    size.map_or_else(|| "unknown".to_owned(), bytes)
}

/// A duration: `850 ns`, `1.2 ms`, `12.3 s`, `2 min 5 s`, `3 h 20 min`, `4 d 2 h`.
pub fn duration(ns: u64) -> String {
    let seconds = (ns.saturating_add(500_000_000)) / 1_000_000_000;
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => scaled(ns, 1_000, "us"),
        1_000_000..1_000_000_000 => scaled(ns, 1_000_000, "ms"),
        1_000_000_000..100_000_000_000 => scaled(ns, 1_000_000_000, "s"),
        _ if seconds < 3600 => two(seconds / 60, "min", seconds % 60, "s"),
        _ if seconds < 86_400 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => two(seconds / 86_400, "d", seconds % 86_400 / 3600, "h"),
    }
}

/// Nanoseconds as seconds with nine decimals, nothing rounded: `5025.123456789`.
pub fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}

/// `part` of `whole` in percent, to one decimal: `99.9 %`. `None` when `whole` is 0.
pub fn percent(part: u64, whole: u64) -> Option<String> {
    let permille = (u128::from(part) * 1000 + u128::from(whole) / 2).checked_div(u128::from(whole))?;
    Some(format!("{} %", decimal(permille, 1)))
}

/// `1 process`, `3 processes`.
pub fn count(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

fn scaled(ns: u64, unit_ns: u64, unit: &str) -> String {
    let places: u32 = if ns / unit_ns < 10 { 2 } else { 1 };
    let ten = 10u128.pow(places);
    let rounded = (u128::from(ns) * ten + u128::from(unit_ns) / 2) / u128::from(unit_ns);
    format!("{} {unit}", decimal(rounded, places))
}

fn two(large: u64, large_unit: &str, small: u64, small_unit: &str) -> String {
    if small == 0 { format!("{large} {large_unit}") } else { format!("{large} {large_unit} {small} {small_unit}") }
}

/// `scaled` divided by 10 to the power of `places`, without trailing zeros.
fn decimal(scaled: u128, places: u32) -> String {
    let ten = 10u128.pow(places);
    let (whole, rest) = (scaled / ten, scaled % ten);
    if rest == 0 {
        return whole.to_string();
    }
    let digits = format!("{rest:0places$}", places = places as usize);
    format!("{whole}.{}", digits.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also what the functions of the HTML page return (tests/tests/browser_page.rs).
    #[test]
    fn the_cases_shared_with_the_page() {
        let cases: serde_json::Value = serde_json::from_str(include_str!("units_cases.json")).unwrap();
        let number = |value: &serde_json::Value| value.as_u64().unwrap();
        for case in cases["bytes"].as_array().unwrap() {
            assert_eq!(bytes(number(&case[0])), case[1].as_str().unwrap());
        }
        for case in cases["duration"].as_array().unwrap() {
            assert_eq!(duration(number(&case[0])), case[1].as_str().unwrap());
        }
        for case in cases["percent"].as_array().unwrap() {
            assert_eq!(percent(number(&case[0]), number(&case[1])).unwrap(), case[2].as_str().unwrap());
        }
    }

    #[test]
    fn sizes_have_about_three_digits() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (450 << 20, "450 MiB"),
            ((450 << 20) - 4096, "450 MiB"),
            ((450 << 20) - (300 << 10), "449.7 MiB"),
            ((1 << 20) - 1, "1 MiB"),
            (9 << 30, "9 GiB"),
            (1_342_177_280, "1.25 GiB"),
            (33_608_957_952, "31.3 GiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (size, text) in cases {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn changes_have_a_sign() {
        assert_eq!(growth(0), "0 B");
        assert_eq!(growth(320 << 20), "+320 MiB");
        assert_eq!(growth(-12288), "-12 KiB");
        assert_eq!(growth(i64::MIN), "-8 EiB");
    }

    #[test]
    fn durations_have_at_most_two_units() {
        let cases = [
            (850, "850 ns"),
            (1_240, "1.24 us"),
            (12_340_000, "12.3 ms"),
            (999_999_999, "1000 ms"),
            (12_300_000_000, "12.3 s"),
            (125_000_000_000, "2 min 5 s"),
            (12_000_000_000_000, "3 h 20 min"),
            (360_000_000_000_000, "4 d 4 h"),
        ];
        for (ns, text) in cases {
            assert_eq!(duration(ns), text);
        }
        let _ = duration(u64::MAX);
        assert_eq!(seconds(5_025_000_000_007), "5025.000000007");
        assert_eq!(percent(999, 1000).unwrap(), "99.9 %");
        assert_eq!(percent(1, 0), None);
        assert_eq!(percent(u64::MAX, 1).unwrap(), "1844674407370955161500 %");
    }
}
