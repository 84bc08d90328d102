//! What an incident is about. A new kind is a new row here: its names and phrases stand nowhere else.

use serde::{Deserialize, Serialize};

/// What an incident is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The kernel's OOM killer killed.
    OomKill,
    /// Memory rose close to the limit and fell again.
    Spike,
    /// A limit was hit, reclaim ran, nobody was killed.
    NearMiss,
    /// A limit was hit and the OOM killer is off: tasks waited (cgroup v1).
    Stuck,
    /// `memtrace record`.
    Recording,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::OomKill, Self::Spike, Self::NearMiss, Self::Stuck, Self::Recording];

    /// The name in the file, in lists and as the label of metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OomKill => "oom_kill",
            Self::Spike => "spike",
            Self::NearMiss => "near_miss",
            Self::Stuck => "stuck",
            Self::Recording => "recording",
        }
    }

    /// The first words of its headline.
    pub const fn title(self) -> &'static str {
        match self {
            Self::OomKill => "OOM kill",
            Self::Spike => "Spike",
            Self::NearMiss => "Near miss",
            Self::Stuck => "Stuck",
            Self::Recording => "Recording",
        }
    }

    /// The moment that its growth leads up to, after a verb: "windows end at the kill".
    pub const fn moment(self) -> &'static str {
        match self {
            Self::OomKill => "at the kill",
            Self::Spike => "at the highest usage",
            Self::NearMiss => "at the first hit",
            Self::Stuck => "where it got stuck",
            Self::Recording => "at the peak",
        }
    }

    /// Which stretch of time its curve shows: "up to the kill".
    pub const fn curve_span(self) -> &'static str {
        match self {
            Self::OomKill => "up to the kill",
            Self::Spike => "around the highest usage",
            Self::NearMiss => "around the first hit",
            Self::Stuck => "up to where it got stuck",
            Self::Recording => "from start to end",
        }
    }

    /// Whether somebody was killed or is held up now: reports show it as an alarm.
    pub const fn is_alarm(self) -> bool {
        matches!(self, Self::OomKill | Self::Stuck)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_file() {
        for kind in Kind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }
}
