//! Downloads packages of other Debian suites with the host's own apt, under a private
//! configuration, lists and cache.
//!
//! Installs nothing and leaves the host's apt state alone. Mirror and keyring are taken from the
//! host's apt sources.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use memtrace_harness::run::{output, say};

/// Age at which package lists are fetched again.
const LISTS_LAST: Duration = Duration::from_secs(12 * 60 * 60);

/// Suites of Debian's main archive; an entry of the host's sources that names one is the main
/// archive.
const CODENAMES: [&str; 10] =
    ["bullseye", "bookworm", "trixie", "forky", "sid", "oldoldstable", "oldstable", "stable", "testing", "unstable"];

/// A package archive, from an entry of the host's apt sources.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Archive {
    uri: String,
    /// Value of Signed-By: file names, or inline keys (lines that begin with a space). `None`: the
    /// keys apt trusts by default.
    signed_by: Option<String>,
}

/// apt with a private configuration.
pub(crate) struct Apt {
    dir: PathBuf,
}

/// A version of a package and the suite it was found in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackageVersion {
    pub(crate) version: String,
    pub(crate) suite: String,
}

impl Apt {
    /// Sets up the configuration in `dir` and fetches the lists of these suites, unless that was
    /// done less than 12 hours ago.
    ///
    /// A list that cannot be fetched is reported, not an error: its packages will not be found
    /// later.
    pub(crate) fn open(dir: &Path, suites: &[&str]) -> Result<Self> {
        let apt = Self { dir: dir.to_path_buf() };
        for sub in ["lists/partial", "cache/archives/partial", "sources", "debs"] {
            let path = dir.join(sub);
            std::fs::create_dir_all(&path).with_context(|| format!("failed to create {}", path.display()))?;
        }
        let sources = sources(&machine_sources(Path::new("/etc/apt"))?, suites)?;
        let changed = write_if_changed(&dir.join("sources/kernels.sources"), &sources)?;
        write_if_changed(&dir.join("apt.conf"), &configuration(dir)?)?;
        write_if_changed(&dir.join("status"), "")?;
        let stamp = dir.join("updated");
        let age = std::fs::metadata(&stamp).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        if changed || age.is_none_or(|age| age > LISTS_LAST) {
            say(format_args!("fetching the package lists of {}", suites.join(", ")));
            match output(apt.command("apt-get").args(["update", "-qq", "--error-on=any"])) {
                Ok(_) => std::fs::write(&stamp, "").with_context(|| format!("failed to write {}", stamp.display()))?,
                Err(error) => say(format_args!("not all package lists could be fetched: {error:#}")),
            }
        }
        Ok(apt)
    }

    /// Newest version of a package in any of these suites.
    pub(crate) fn newest(&self, package: &str, suites: &[&str]) -> Result<PackageVersion> {
        let listed = output(self.command("apt-cache").args(["madison", package]))?;
        newest_of(&listed, suites)
            .with_context(|| format!("no {package} in {}: could its package list be fetched?", suites.join(" or ")))
    }

    /// Packages that this one depends on in exactly its own version.
    pub(crate) fn parts(&self, package: &str, version: &str) -> Result<Vec<String>> {
        let shown = output(self.command("apt-cache").args(["show", &format!("{package}={version}")]))?;
        Ok(parts_of(&shown, version))
    }

    /// Downloads packages of one version and returns the files.
    pub(crate) fn download(&self, packages: &[String], version: &str) -> Result<Vec<PathBuf>> {
        let dir = self.dir.join("debs").join(version.replace(['/', ':'], "_"));
        std::fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let mut download = self.command("apt-get");
        download.current_dir(&dir).args(["download", "-qq"]);
        output(download.args(packages.iter().map(|package| format!("{package}={version}"))))?;
        let entries = std::fs::read_dir(&dir).with_context(|| format!("failed to read {}", dir.display()))?;
        Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|p| p.extension().is_some()).collect())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.dir.join("apt.conf")).env("LC_ALL", "C");
        command
    }
}

/// apt.conf text: all paths below `dir`, and none of the host's hooks.
fn configuration(dir: &Path) -> Result<String> {
    let dir = dir.to_str().context("the path of the target directory is not UTF-8")?;
    Ok(format!(
        "Dir::Etc::SourceList \"/dev/null\";\n\
         Dir::Etc::SourceParts \"{dir}/sources\";\n\
         Dir::Etc::Preferences \"/dev/null\";\n\
         Dir::Etc::PreferencesParts \"/dev/null\";\n\
         Dir::State \"{dir}\";\n\
         Dir::State::Lists \"{dir}/lists\";\n\
         Dir::State::status \"{dir}/status\";\n\
         Dir::Cache \"{dir}/cache\";\n\
         APT::Architecture \"amd64\";\n\
         APT::Architectures {{ \"amd64\"; }};\n\
         APT::Sandbox::User \"\";\n\
         Acquire::Languages \"none\";\n\
         #clear APT::Update::Pre-Invoke;\n\
         #clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n\
         #clear Acquire::IndexTargets::deb::DEP-11;\n"
    ))
}

/// Texts of the host's source files, each with whether it is in deb822 format.
fn machine_sources(etc: &Path) -> Result<Vec<(bool, String)>> {
    let mut files = vec![etc.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(etc.join("sources.list.d")) {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    let mut texts = Vec::new();
    for file in files.into_iter().filter(|file| file.is_file()) {
        let deb822 = match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => true,
            Some("list") => false,
            _ => continue,
        };
        let text = std::fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
        texts.push((deb822, text));
    }
    Ok(texts)
}

/// Source file text: these suites, at the archives of the host's sources.
fn sources(machine: &[(bool, String)], suites: &[&str]) -> Result<String> {
    let entries = || machine.iter().flat_map(|(deb822, text)| if *deb822 { stanzas(text) } else { lines(text) });
    let main = entries().find(|(_, suites)| suites.iter().any(|suite| CODENAMES.contains(&suite.as_str())));
    let security = entries().find(|(_, suites)| suites.iter().any(|suite| suite.ends_with("-security")));
    let Some((main, _)) = main else {
        bail!(
            "the kernels come from Debian's archive, and no Debian mirror is among this machine's apt sources \
             (/etc/apt/sources.list and sources.list.d): run this on Debian"
        );
    };
    let mut text = String::new();
    let (in_security, in_main): (Vec<&str>, Vec<&str>) =
        suites.iter().copied().partition(|suite| suite.ends_with("-security"));
    let archives = [(Some(main), in_main), (security.map(|(archive, _)| archive), in_security)];
    for (archive, suites) in archives.into_iter().filter(|(_, suites)| !suites.is_empty()) {
        // without security updates among the host's sources, these suites are left out
        let Some(archive) = archive else { continue };
        let suites = suites.join(" ");
        text.push_str(&format!("Types: deb\nURIs: {}\nSuites: {suites}\nComponents: main\n", archive.uri));
        if let Some(keys) = archive.signed_by {
            text.push_str(&format!("Signed-By: {keys}\n"));
        }
        text.push('\n');
    }
    Ok(text)
}

/// Entries of a deb822 file that offer binary packages of `main`: archive and suites.
fn stanzas(text: &str) -> Vec<(Archive, Vec<String>)> {
    let mut found = Vec::new();
    for stanza in text.split("\n\n") {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza.lines().filter(|line| !line.starts_with('#')) {
            match (line.starts_with([' ', '\t']), fields.last_mut(), line.split_once(':')) {
                (true, Some((_, value)), _) => value.push_str(&format!("\n{line}")),
                (false, _, Some((name, value))) => {
                    fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
                }
                _ => {}
            }
        }
        let field = |name: &str| fields.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str());
        let words = |name: &str| field(name).unwrap_or("").split_ascii_whitespace().map(str::to_owned).collect();
        let (types, components, suites): (Vec<String>, Vec<String>, _) =
            (words("types"), words("components"), words("suites"));
        let enabled = field("enabled").is_none_or(|value| value != "no");
        let wanted = enabled && types.iter().any(|t| t == "deb") && components.iter().any(|c| c == "main");
        if let (true, Some(uri)) = (wanted, field("uris").and_then(|uris| uris.split_ascii_whitespace().next())) {
            let signed_by = field("signed-by").map(str::to_owned);
            found.push((Archive { uri: uri.to_owned(), signed_by }, suites));
        }
    }
    found
}

/// Entries of a one-line file that offer binary packages of `main`: `deb [signed-by=KEYS] URI SUITE
/// COMPONENT..`.
fn lines(text: &str) -> Vec<(Archive, Vec<String>)> {
    let entry = |line: &str| {
        let rest = line.split('#').next()?.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_ascii_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        words.any(|component| component == "main").then_some(())?;
        let signed_by = options.split_ascii_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        let signed_by = signed_by.map(|keys| keys.replace(',', " "));
        Some((Archive { uri: uri.to_owned(), signed_by }, vec![suite.to_owned()]))
    };
    text.lines().filter_map(entry).collect()
}

/// First line of `apt-cache madison` (`PACKAGE | VERSION | URI SUITE/COMPONENT ARCH Packages`,
/// newest first) that is in one of these suites.
fn newest_of(madison: &str, suites: &[&str]) -> Option<PackageVersion> {
    madison.lines().find_map(|line| {
        let mut columns = line.split('|').map(str::trim);
        let (_, version, origin) = (columns.next()?, columns.next()?, columns.next()?);
        let suite = origin.split_ascii_whitespace().nth(1)?.split('/').next()?;
        suites.contains(&suite).then(|| PackageVersion { version: version.to_owned(), suite: suite.to_owned() })
    })
}

fn parts_of(shown: &str, version: &str) -> Vec<String> {
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or("");
    let same = format!("(= {version})");
    let part = |dependency: &str| dependency.trim().strip_suffix(&same).map(|name| name.trim().to_owned());
    depends.split(',').filter_map(part).collect()
}

fn write_if_changed(path: &Path, text: &str) -> Result<bool> {
    if std::fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(false);
    }
    std::fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "Types: deb\n# an old address\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n\
        Components: main\nSigned-By: /keys/debian.gpg\n\n\
        Types: deb\nURIs: http://mirror/debian-security\nSuites: bookworm-security\nComponents: main\n\
        Signed-By: /keys/debian.gpg\n";

    #[test]
    fn other_suites_come_from_the_machines_own_mirror_with_its_keys() {
        let made = sources(&[(true, DEB822.to_owned())], &["sid", "bullseye", "bullseye-security"]).unwrap();
        assert_eq!(
            made,
            "Types: deb\nURIs: http://mirror/debian\nSuites: sid bullseye\nComponents: main\n\
             Signed-By: /keys/debian.gpg\n\n\
             Types: deb\nURIs: http://mirror/debian-security\nSuites: bullseye-security\nComponents: main\n\
             Signed-By: /keys/debian.gpg\n\n"
        );
    }

    #[test]
    fn one_line_sources_are_read_too() {
        let text = "# deb http://no/ bookworm main\ndeb-src http://no/ bookworm main\n\
            deb https://elsewhere/apt nodistro main\n\
            deb [arch=amd64 signed-by=/a.gpg,/b.gpg] http://mirror/debian/ stable main contrib\n\
            deb http://mirror/security stable-security main\n";
        let made = sources(&[(false, text.to_owned())], &["trixie", "trixie-security"]).unwrap();
        assert_eq!(
            made,
            "Types: deb\nURIs: http://mirror/debian/\nSuites: trixie\nComponents: main\nSigned-By: /a.gpg /b.gpg\n\n\
             Types: deb\nURIs: http://mirror/security\nSuites: trixie-security\nComponents: main\n\n"
        );
    }

    #[test]
    fn keys_inside_the_sources_are_taken_along() {
        let text = "Types: deb deb-src\nURIs: http://m/debian\nSuites: trixie\nComponents: main\nSigned-By:\n \
            -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\nTypes: deb\nEnabled: no\nURIs: x\nSuites: sid\nComponents: main\n";
        let made = sources(&[(true, text.to_owned())], &["sid"]).unwrap();
        assert!(made.ends_with("Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\n"), "{made}");
    }

    #[test]
    fn a_machine_without_a_debian_mirror_is_told_so() {
        let text = "deb http://archive/ubuntu noble main\n".to_owned();
        let error = sources(&[(false, text)], &["sid"]).unwrap_err().to_string();
        assert!(error.contains("no Debian mirror"), "{error}");
    }

    #[test]
    fn the_newest_version_of_a_suite_is_found() {
        let listed = "linux-image-amd64 | 7.2.13-1 | http://m/debian sid/main amd64 Packages\n\
            linux-image-amd64 | 6.1.192-2 | http://m/debian-security bookworm-security/main amd64 Packages\n\
            linux-image-amd64 | 6.1.176-1 | http://m/debian bookworm/main amd64 Packages\n";
        let newest = |suites: &[&str]| newest_of(listed, suites).map(|candidate| candidate.version);
        assert_eq!(newest(&["bookworm", "bookworm-security"]).as_deref(), Some("6.1.192-2"));
        assert_eq!(newest(&["bookworm"]).as_deref(), Some("6.1.176-1"));
        assert_eq!(newest(&["trixie"]), None);
    }

    #[test]
    fn the_parts_of_a_package_are_those_of_its_version() {
        let shown =
            "Package: x\nDepends: kmod, dracut | initramfs-tools (>= 0.1), a-1 (= 7.3-1), b (= 7.2-1), c+2 (= 7.3-1)\n";
        assert_eq!(parts_of(shown, "7.3-1"), ["a-1", "c+2"]);
    }
}
