//! Questions about a run: every stage is a table of its committed shards, `STAGE_dropped` the rows it
//! dropped.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::logical_expr::ScalarUDF;
use datafusion::prelude::{ParquetReadOptions, SessionConfig, SessionContext};

use crate::error::{Error, Result};
use crate::manifest::Journal;
use crate::run::default_memory_limit;
use crate::stage::file_url;
use crate::status::summaries;

/// A session with the tables of `run_dir` and `functions`, on all cores, and the names of the tables. It holds as much
/// in memory as a run does by default and spills to the directory for temporary files: the run directory is only read.
///
/// Journals decide which files belong to a table, so a run that is going on can be asked too.
pub async fn session(run_dir: &Path, functions: Vec<ScalarUDF>) -> Result<(SessionContext, Vec<String>)> {
    let pool = Arc::new(FairSpillPool::new(default_memory_limit()));
    let runtime = RuntimeEnvBuilder::new().with_memory_pool(pool).build_arc()?;
    let session = SessionContext::new_with_config_rt(SessionConfig::new().with_information_schema(true), runtime);
    functions.into_iter().for_each(|f| session.register_udf(f));
    let mut tables = Vec::new();
    for summary in summaries(run_dir)? {
        let dir = run_dir.join(&summary.stage);
        // Files of the stage's own directory are its rows; those of `dropped/` (and of other directories
        // below it) are rows of another kind, and tables of their own.
        let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for entry in Journal::read(&dir)?.into_values() {
            for file in entry.files.iter().filter(|f| f.path.extension().is_some_and(|e| e == "parquet")) {
                let url = file_url(&dir.join(&file.path))?;
                let kind = file.path.parent().filter(|p| !p.as_os_str().is_empty());
                let table = kind.map_or(summary.stage.clone(), |k| format!("{}_{}", summary.stage, k.display()));
                files.entry(table).or_default().push(url);
            }
        }
        for (name, files) in files {
            let rows = session.read_parquet(files, ParquetReadOptions::default()).await?;
            session.register_table(name.as_str(), rows.into_view())?;
            tables.push(name);
        }
    }
    if tables.is_empty() {
        return Err(Error::Recipe(format!("{} has no shards yet", run_dir.display())));
    }
    Ok((session, tables))
}
