//! The kinds of incident. The names and phrases of a kind stand only here, so a new kind needs one
//! new variant and one line in each function below.

use serde::{Deserialize, Serialize};

/// What an incident is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The kernel's OOM killer killed a process.
    OomKill,
    /// Usage rose close to the limit within a second and fell again, without a kill.
    Spike,
    /// A limit was hit and reclaim ran, without a kill.
    NearMiss,
    /// A limit was hit with the OOM killer off, so tasks waited for memory (cgroup v1).
    Stuck,
    /// Not an event: what `memtrace record` recorded.
    Recording,
}

impl Kind {
    /// Every kind, in the order of the variants.
    pub const ALL: [Self; 5] = [Self::OomKill, Self::Spike, Self::NearMiss, Self::Stuck, Self::Recording];

    /// The name in the file and in lists, and the label in metrics: `oom_kill`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OomKill => "oom_kill",
            Self::Spike => "spike",
            Self::NearMiss => "near_miss",
            Self::Stuck => "stuck",
            Self::Recording => "recording",
        }
    }

    /// The first words of the headline: `OOM kill`.
    pub const fn title(self) -> &'static str {
        match self {
            Self::OomKill => "OOM kill",
            Self::Spike => "Spike",
            Self::NearMiss => "Near miss",
            Self::Stuck => "Stuck",
            Self::Recording => "Recording",
        }
    }

    /// The name on the command line: [`Kind::name`] with hyphens.
    pub const fn flag_value(self) -> &'static str {
        match self {
            Self::OomKill => "oom-kill",
            Self::NearMiss => "near-miss",
            Self::Spike | Self::Stuck | Self::Recording => self.name(),
        }
    }

    /// One sentence without a full stop, for help texts.
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::OomKill => "The OOM killer killed",
            Self::Spike => "Memory came close to a limit and fell again",
            Self::NearMiss => "A limit was hit without a kill",
            Self::Stuck => "A cgroup waited at its limit with its OOM killer off",
            Self::Recording => "A recording of `memtrace record`",
        }
    }

    /// The kind with this name, in the file's or the command line's form; `oom` is short for an OOM kill.
    pub fn named(name: &str) -> Option<Self> {
        let is = |kind: &Self| name == kind.name() || name == kind.flag_value();
        Self::ALL.into_iter().find(is).or((name == "oom").then_some(Self::OomKill))
    }

    /// The moment at which the growth windows end, to follow a verb: "windows end at the kill".
    pub const fn moment(self) -> &'static str {
        match self {
            Self::OomKill => "at the kill",
            Self::Spike => "at the highest usage",
            Self::NearMiss => "at the first hit",
            Self::Stuck => "where it got stuck",
            Self::Recording => "at the peak",
        }
    }

    /// The span of time that the curve shows: "up to the kill".
    pub const fn curve_span(self) -> &'static str {
        match self {
            Self::OomKill => "up to the kill",
            Self::Spike => "around the highest usage",
            Self::NearMiss => "around the first hit",
            Self::Stuck => "up to where it got stuck",
            Self::Recording => "from start to end",
        }
    }

    /// Whether a process was killed or tasks wait for memory. Reports show these kinds as alarms.
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
            assert_eq!(kind.flag_value(), kind.name().replace('_', "-"));
            assert_eq!((Kind::named(kind.name()), Kind::named(kind.flag_value())), (Some(kind), Some(kind)));
        }
    }
}
