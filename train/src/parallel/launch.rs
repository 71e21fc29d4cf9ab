//! Which rank a process is, as its launcher says in the environment: torchrun's variables, or SLURM's.

use crate::Error;

/// Where ranks of a SLURM job meet whose port nobody chose: this and the job's number.
const SLURM_PORTS: u16 = 20_000;
/// torchrun's own choice.
const PORT: u16 = 29_500;

/// The place of a process among those of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Number of this process, from 0.
    pub rank: usize,
    /// Number of processes, at least 1.
    pub world: usize,
    /// Number of this process among those of its host.
    pub local_rank: usize,
    /// Host and port where rank 0 waits for the others.
    pub master: (String, u16),
    /// What the launcher calls the job, where it gives it a name.
    pub job: Option<String>,
}

impl Launch {
    /// What the environment says; one process where it says nothing.
    ///
    /// RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT count first. Without RANK those of SLURM do: SLURM_PROCID,
    /// SLURM_STEP_NUM_TASKS or SLURM_NTASKS, SLURM_LOCALID, and the first host of SLURM_JOB_NODELIST. The job is
    /// TORCHELASTIC_RUN_ID, or SLURM_JOB_ID, with SLURM_STEP_ID where SLURM has numbered the ranks.
    ///
    /// # Errors
    /// [`Error::Config`] with the variable that is missing or no number.
    pub fn from_env() -> Result<Self, Error> {
        Self::of(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let number = |name: &str| -> Result<Option<usize>, Error> {
            let parse = |text: String| text.parse().map_err(|_| Error::config(name, format!("{text:?} is no number")));
            variable(name).map(parse).transpose()
        };
        let need = |name: &str| {
            let missing = || Error::config(name, "is not set, though RANK is: torchrun, or --nproc, sets all of them");
            number(name)?.ok_or_else(missing)
        };
        let (rank, world, local_rank, slurm) = match number("RANK")? {
            Some(rank) => (rank, need("WORLD_SIZE")?, number("LOCAL_RANK")?.unwrap_or(rank), false),
            None => {
                let tasks = number("SLURM_STEP_NUM_TASKS")?.or(number("SLURM_NTASKS")?);
                match (number("SLURM_PROCID")?, tasks) {
                    (Some(rank), Some(tasks)) if tasks > 1 => {
                        (rank, tasks, number("SLURM_LOCALID")?.unwrap_or(rank), true)
                    }
                    _ => return Ok(Self::alone()),
                }
            }
        };
        if rank >= world {
            let name = if slurm { "SLURM_PROCID" } else { "RANK" };
            return Err(Error::config(name, format!("{rank} is not below the number of ranks, {world}")));
        }
        let host = variable("MASTER_ADDR");
        // A step may have other hosts than its job.
        let hosts = || variable("SLURM_STEP_NODELIST").or_else(|| variable("SLURM_JOB_NODELIST"));
        let host = host.or_else(|| slurm.then(|| hosts().map(|list| first_host(&list))).flatten());
        let host = host.ok_or_else(|| Error::config("MASTER_ADDR", "is not set: the host of rank 0"))?;
        let port = match number("MASTER_PORT")? {
            Some(port) => match u16::try_from(port) {
                Ok(port) if port > 0 => port,
                _ => return Err(Error::config("MASTER_PORT", format!("{port} is no port"))),
            },
            None if slurm => SLURM_PORTS + (number("SLURM_JOB_ID")?.unwrap_or(0) % 20_000) as u16,
            None => PORT,
        };
        let step = variable("SLURM_STEP_ID").filter(|_| slurm).map_or(String::new(), |step| format!(".{step}"));
        // Ranks that somebody else has numbered may be of several jobs of SLURM.
        let of_slurm = || variable("SLURM_JOB_ID").filter(|_| slurm).map(|job| format!("{job}{step}"));
        let job = variable("TORCHELASTIC_RUN_ID").filter(|_| !slurm).or_else(of_slurm);
        Ok(Self { rank, world, local_rank, master: (host, port), job })
    }

    /// One process.
    pub fn alone() -> Self {
        Self { rank: 0, world: 1, local_rank: 0, master: ("127.0.0.1".to_owned(), PORT), job: None }
    }

    /// The variables that say so, torchrun's.
    pub fn variables(&self) -> [(&'static str, String); 5] {
        [
            ("RANK", self.rank.to_string()),
            ("WORLD_SIZE", self.world.to_string()),
            ("LOCAL_RANK", self.local_rank.to_string()),
            ("MASTER_ADDR", self.master.0.clone()),
            ("MASTER_PORT", self.master.1.to_string()),
        ]
    }

    pub(super) fn failed(&self, reason: String) -> Error {
        let address = format!("{}:{}", self.master.0, self.master.1);
        Error::Rendezvous { rank: self.rank, world: self.world, address, reason }
    }
}

/// The first host of a list such as `gpu[007-012,20],login1`.
fn first_host(list: &str) -> String {
    let mut host = String::new();
    let mut rest = list;
    while let Some(at) = rest.find([',', '[']) {
        host.push_str(&rest[..at]);
        let Some(numbers) = rest[at..].strip_prefix('[') else { return host };
        host.push_str(&numbers[..numbers.find([',', '-', ']']).unwrap_or(numbers.len())]);
        rest = numbers.find(']').map_or("", |end| &numbers[end + 1..]);
    }
    host + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Launch, String> {
        let variable =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Launch::of(variable).map_err(|error| error.to_string())
    }

    #[test]
    fn torchruns_variables_are_read_and_written() {
        assert_eq!(of(&[]).unwrap(), Launch::alone());
        let launch = Launch { rank: 5, world: 8, local_rank: 1, master: ("host".into(), 1234), job: None };
        let variables = launch.variables();
        let variables: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert_eq!(of(&variables).unwrap(), launch);
        // Steps of one job may be what starts the ranks, each one of them.
        let job = |more: &[(&str, &str)]| of(&[&variables[..], more].concat()).unwrap().job;
        assert_eq!(job(&[("SLURM_JOB_ID", "7"), ("SLURM_STEP_ID", "2")]), None);
        assert_eq!(job(&[("SLURM_JOB_ID", "7"), ("TORCHELASTIC_RUN_ID", "a")]).unwrap(), "a");
        let error = of(&[("RANK", "0")]).unwrap_err();
        assert!(error.contains("WORLD_SIZE"), "{error}");
        let error = of(&[("RANK", "8"), ("WORLD_SIZE", "8")]).unwrap_err();
        assert!(error.contains("8 is not below"), "{error}");
        let error = of(&[("RANK", "x"), ("WORLD_SIZE", "8")]).unwrap_err();
        assert!(error.starts_with("RANK: \"x\" is no number"), "{error}");
        let error = of(&[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "70000")]);
        assert!(error.unwrap_err().contains("no port"));
    }

    #[test]
    fn slurms_variables_are_read() {
        let step = [
            ("SLURM_PROCID", "9"),
            ("SLURM_NTASKS", "16"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "120007"),
            ("SLURM_STEP_ID", "3"),
            ("SLURM_JOB_NODELIST", "gpu[007-012,20],login1"),
        ];
        let job = Some("120007.3".into());
        let want = Launch { rank: 9, world: 16, local_rank: 1, master: ("gpu007".into(), 20_007), job };
        assert_eq!(of(&step).unwrap(), want);
        // A job of one task is one process.
        assert_eq!(of(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")]).unwrap(), Launch::alone());
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, host) in [("a", "a"), ("a,b", "a"), ("n[1,3]", "n1"), ("n-[01-04]", "n-01"), ("n[5]", "n5")] {
            assert_eq!(first_host(list), host);
        }
        for (list, host) in [("n[1-4]-ib,login", "n1-ib"), ("r[1-2]n[3-4],x", "r1n3"), ("n[2", "n2"), ("", "")] {
            assert_eq!(first_host(list), host);
        }
    }
}
